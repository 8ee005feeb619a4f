"""`hintjax tune`: chosen on the validation split alone, and killed without a loss."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.setting import prepare
from hintjax.experiments.tasks import TASKS
from hintjax.experiments.tuning import crowd
from hintjax.experiments.tuning.groups import plan_of, settings_read
from hintjax.experiments.tuning.halving import ranked
from hintjax.experiments.tuning.results import best_config, markdown, table

TINY = (
    *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
    *("--epochs", "4", "--teacher-epochs", "2"),
)
OVER = ("--over", "weight=0.5,2", "learning_rate=1e-7,0.003")


class Sealed:
    """A test split whose examples nobody may read."""

    def __init__(self, split):
        self.n, self.shape = split.n, split.shape

    def __getattr__(self, name):
        raise AssertionError(f"the test split was read: {name}")


@pytest.fixture(scope="module")
def teacher(corners, tmp_path_factory):
    """The directory of a trained teacher."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    common = ("--dataset", corners, *TINY, "--devices", "1", "--run-dir", str(run_dir))
    main(["distill", "--method", "backprop", *common])
    return str(run_dir)


@pytest.fixture(scope="module")
def given(corners, teacher):
    """A config file."""
    return configs.Config(
        dataset=corners,
        teacher=teacher,
        student="hintjax.models:plain_wide",
        method="at",
        epochs=4,
    )


@pytest.fixture
def without_test_split(monkeypatch):
    from hintjax.experiments import setting

    load = setting.load

    def sealed(*arguments, **options):
        dataset = load(*arguments, **options)
        return dataset._replace(test=Sealed(dataset.test))

    monkeypatch.setattr(setting, "load", sealed)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A tuning that nothing interrupts: its directory and its printed text."""
    path = tmp_path_factory.mktemp("tuning")
    configs.save(given, path)
    run_dir = path / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_test_split.__wrapped__(patch)
        main(["tune", str(path), *OVER, "--run-dir", str(run_dir)])
    return run_dir


def recorded(run_dir):
    record = json.loads((run_dir / "tuning.json").read_text())
    del record["spent"]
    return record


def test_the_better_half_trains_on_and_the_validation_split_chooses(whole, given):
    """The whole tuning ran with a test split that raises when it is read."""
    tried = recorded(whole)["methods"]["at"]
    assert [row["settings"] for row in tried] == [
        f"weight={weight} learning_rate={rate}"
        for weight in ("0.5", "2")
        for rate in ("1e-07", "0.003")
    ]
    assert sorted(row["epochs"] for row in tried) == [[1], [1], [1, 2], [1, 2, 4]]
    best = max(tried, key=lambda row: len(row["validation"]))
    assert "learning_rate=0.003" in best["settings"]
    config = configs.load(whole / "tuned")
    weight = float(best["settings"].split()[0].removeprefix("weight="))
    expected = dataclasses.replace(given, weight=weight, learning_rate=0.003)
    assert config == expected
    assert not (whole / "students").exists()


def test_the_results_are_a_table_a_picture_and_a_config(whole, capsys):
    pytest.importorskip("matplotlib")
    main(["resume", str(whole)])  # trains nothing, and shows all again
    said = capsys.readouterr().out
    rows = (whole / "tuning.md").read_text().splitlines()
    assert rows[0].split(" | ") == [
        *("| method", "weight", "learning_rate", "epochs", "validation accuracy |")
    ]
    assert sum(row.startswith("| at |") for row in rows) == 4
    assert f"hintjax distill --config {whole / 'tuned'}" in said
    assert "times the time of the steps" in said
    assert (whole / "tuning.png").read_bytes().startswith(b"\x89PNG")


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    ("saves", "rungs"),
    [
        pytest.param(1, 0, marks=pytest.mark.long),
        pytest.param(4, 0, marks=pytest.mark.long),
        (6, 1),
    ],
)
def test_a_tuning_that_was_killed_goes_on_to_the_same_metrics(
    whole, given, tmp_path, monkeypatch, saves, rungs
):
    """Killed after a step of the first rung, at its end, and in the second.

    The students of one cached teacher come to the same metrics, too.
    """
    cached = saves == 6
    patient = dataclasses.replace(given, checkpoint_seconds=1e-9, cache=cached)
    configs.save(patient, tmp_path)
    save, made = crowd._save, []

    def killed(*arguments):
        save(*arguments)
        made.append(None)
        if len(made) == saves:
            raise Killed

    monkeypatch.setattr(crowd, "_save", killed)
    run_dir = tmp_path / "run"
    with pytest.raises(Killed):
        main(["tune", str(tmp_path), *OVER, "--run-dir", str(run_dir)])
    assert len(made) == saves
    rows = recorded(run_dir)["methods"]["at"]
    assert {len(row["validation"]) for row in rows} == {rungs}
    main(["resume", str(run_dir)])
    assert recorded(run_dir) == recorded(whole)
    assert (run_dir / "cache").exists() == cached


@pytest.mark.long
def test_a_process_that_was_killed_goes_on_and_a_signal_saves_it(
    whole, given, tmp_path
):
    configs.save(dataclasses.replace(given, epochs=40), tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # one device, as elsewhere
    cache = Path(__file__).parents[3] / ".jax_cache"
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "hintjax.cli", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    one, two = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start("tune", str(tmp_path), *OVER, "--run-dir", str(one))
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors
    process = start("tune", str(tmp_path), *OVER, "--run-dir", str(two))
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        saved = sorted(two.glob("students/*/*"))
        while sorted(two.glob("students/*/*")) == saved and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == code
        process = start("resume", str(two))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert recorded(one) == recorded(two)


@pytest.mark.parametrize(
    "method", ["at", pytest.param("fitnets", marks=pytest.mark.long)]
)
def test_a_candidate_learns_as_the_run_with_its_settings(
    method, given, tmp_path, monkeypatch
):
    """The validated metric is that of `hintjax distill --config tuned`."""
    states, train = [], crowd.train

    def watched(*arguments):
        states.append(train(*arguments).states)
        return crowd.Standing(0, 0, states[-1])

    monkeypatch.setattr("hintjax.experiments.tuning.halving.train", watched)
    configs.save(dataclasses.replace(given, method=method, devices=1), tmp_path)
    run_dir = tmp_path / "run"
    over = ("weight=0.7", "learning_rate=0.003")
    main(["tune", str(tmp_path), "--over", *over, "--run-dir", str(run_dir)])
    (row,) = recorded(run_dir)["methods"][method]
    again = ("--config", str(run_dir / "tuned"), "--run-dir", str(tmp_path / "again"))
    main(["distill", *again])
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert row["validation"] == [pytest.approx(result["validation/accuracy"])]
    (state,) = states[0].values()
    assert int(state.step) * (2 if method == "fitnets" else 1) == result["steps"]


@pytest.mark.quick
def test_a_comparison_takes_the_best_settings_of_each_method():
    config = Config(compare=("at", "kd"), settings=("at.weight=5", "at.kd_weight=1"))
    tried = {
        "at": [
            {"settings": "weight=1", "validation": [0.9], "epochs": [1]},
            {"settings": "weight=30", "validation": [0.5, 0.8], "epochs": [1, 2]},
            {"settings": "weight=20", "validation": [0.4, 0.7], "epochs": [1, 2]},
        ],
        "kd": [{"settings": "temperature=2", "validation": [0.5], "epochs": [2]}],
    }
    record = {"methods": tried, "spent": {}}
    assert best_config(config, record).settings == (
        *("at.weight=30", "at.kd_weight=1", "kd.temperature=2"),
    )
    rows = table(TASKS["classification"], record)
    assert [row[:2] for row in rows[1:]] == [
        *(["at", "30"], ["at", "20"], ["at", "1"], ["kd", ""])
    ]
    assert markdown([["a"], ["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


@pytest.mark.quick
def test_a_metric_that_is_not_a_number_is_the_worst():
    nan = float("nan")
    tried = [{"validation": [value]} for value in (nan, 0.2, 0.9)]
    assert ranked(TASKS["classification"], tried, [0, 1, 2], 0) == [2, 1, 0]
    assert ranked(TASKS["regression"], tried, [0, 1, 2], 0) == [1, 2, 0]


@pytest.fixture(scope="module")
def setting(given):
    return prepare(dataclasses.replace(given, devices=1), teach=True)


@pytest.mark.quick
def test_candidates_share_a_program_unless_it_depends_on_their_settings(setting):
    pairs = [("conv2=conv2",), ("conv3=conv3",)]
    tried = [
        {"weight": 10.0**weight, "learning_rate": 0.1, "pairs": pair}
        for pair in pairs
        for weight in range(3)
    ]
    plan = plan_of(setting, "at", tried)
    assert [list(group.candidates) for group in plan.groups] == [[0, 1, 2], [3, 4, 5]]
    assert plan.epochs() == 6 * 1 + 3 * (2 - 1) + 1 * (4 - 2)
    assert plan.groups[0].recipe.adjustable


@pytest.mark.quick
def test_the_settings_that_a_method_reads_are_known(setting):
    def read(method, **fields):
        config = dataclasses.replace(setting.config, **fields)
        return settings_read(setting, method, config)

    task = {"learning_rate", "weight", "task_weight", "kd_weight"}
    assert read("at") == task | {"pairs"}
    assert read("at", kd_weight=1.0) == task | {"pairs", "temperature"}
    assert read("kd") == task | {"temperature"}
    assert read("backprop") == {"learning_rate"}
    assert read("crd") == task | {"pairs", "negatives"}
    assert read("fitnets") >= {"pairs", "hinted_rate", "hint_epochs", "temperature"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "at"], "expected values of a setting in --over, got none"),
        (["--over", "weight=1"], "tune: expected a method, got none. Name one with"),
        (
            ["--method", "kd", "--over", "pairs=a=b", "weight=1"],
            "tune: expected settings that kd reads, got pairs. It reads kd_weight, ",
        ),
        (
            ["--method", "at", "--balance", "0.5", "--over", "weight=1"],
            "tune: expected no --balance",
        ),
        (
            ["--candidates", "3", "runs/first"],
            "tune: expected the config file as the first argument, got runs/first",
        ),
        (
            ["--method", "at", "--over", "pairs=conv2=nothing"],
            "expected the path of a layer, got 'nothing'",
        ),
        (["nowhere.yaml"], "config: expected a file nowhere.yaml, got nothing"),
    ],
)
def test_a_tuning_that_cannot_work_is_refused_before_it_trains(
    arguments, sentence, corners, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    common = ("--dataset", corners, *TINY, "--run-dir", str(tmp_path / "run"))
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments, *common])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "tuning.json").exists()
