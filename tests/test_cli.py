"""The command, run as a user runs it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hintjax import models
from hintjax.cli import main
from hintjax.experiments import suggestion
from hintjax.experiments.config import Config, save
from hintjax.experiments.distill import keep_compiled
from hintjax.experiments.evaluating import shipped
from hintjax.experiments.finished import load_student
from hintjax.experiments.setting import batches_of, prepare
from hintjax.experiments.teaching import check_teacher
from hintjax.networks import Wants
from hintjax.pairing import Candidate, Measured
from hintjax.training import NothingLearned, fingerprint, load_tree, read_metrics
from hintjax.training.run_directory import owned

TINY = (
    *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
    *("--epochs", "4", "--teacher-epochs", "2", "--devices", "1"),
)


def narrow(classes):
    """A factory whose network has fewer outputs than classes."""
    return models.plain_wide(classes=classes - 1)


@pytest.fixture(scope="module")
def finished(corners, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "a run"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir))
    main(["distill", "--method", "fitnets", *common])
    return run_dir


def test_a_run_directory_holds_all_of_the_run(finished):
    assert {path.name for path in finished.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "student"),
        *("teacher", "result.json", "facts.json", "report.html"),
    }
    result = json.loads((finished / "result.json").read_text())
    assert result["class_names"] == ["0", "1", "2", "3"]
    stages = [line["stage"] for line in read_metrics(finished)]
    assert stages == ["fitnets", "fitnets", "soft_targets", "soft_targets"]


def test_the_student_on_disk_is_what_plain_apply_takes(finished):
    variables = load_tree(finished / "student")
    assert set(variables) == {"params"}
    module = models.plain_wide(classes=4)
    logits = module.apply(variables, jnp.ones((2, 8, 8, 1)))
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(finished / "student")
    assert jnp.array_equal(logits, module.apply(plain, jnp.ones((2, 8, 8, 1))))


def test_a_run_is_run_again_from_its_own_config(finished, tmp_path):
    again = tmp_path / "again"
    main(
        ["distill", "--config", str(finished / "config.yaml"), "--run-dir", str(again)]
    )
    assert fingerprint(load_tree(again / "student")) == fingerprint(
        load_tree(finished / "student")
    )


def test_a_teacher_can_be_an_earlier_run(finished, corners, tmp_path, capsys):
    run_dir = tmp_path / "kd"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir))
    main(["distill", "--method", "kd", "--teacher", str(finished), *common])
    assert not (run_dir / "teacher").exists()
    main(["eval", str(run_dir)])
    said = capsys.readouterr().out
    assert "test accuracy:" in said
    assert re.search(r"goodput \d+\.\d%, less compilation \(checkpoints .*steps", said)
    result = json.loads((run_dir / "result.json").read_text())
    assert {"test/kd", "test/task/accuracy", "validation/loss"} <= set(result)


@pytest.mark.long
def test_a_student_that_rounds_is_evaluated_and_taught_from_as_it_is(
    finished, corners, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir), "--quantize")
    teacher = ("--teacher", str(finished / "teacher"))
    main(["distill", "--method", "fitnets", *teacher, *common])
    variables = load_tree(run_dir / "student")
    assert set(variables) == {"params", "quantization"}
    limits = jax.tree.leaves(variables["quantization"])
    assert len(limits) == 4 and all(low < high for low, high in limits)
    capsys.readouterr()
    main(["eval", str(run_dir)])
    result = json.loads((run_dir / "result.json").read_text())
    assert f"test accuracy: {result['test/accuracy']:.4f}" in capsys.readouterr().out
    # Its parameters go into the plain network for export.
    wants = Wants(output=True)
    setting, rounds, own = shipped(run_dir)
    _, plain, same = shipped(run_dir, rounding=False)
    x = next(batches_of(setting, setting.dataset.test))["image"][:8]
    rounded, exact = (
        network.apply(*own, x, wants=wants, train=False)[0].output
        for network in (rounds, plain)
    )
    want = models.plain_wide(classes=4).apply(variables, x)
    np.testing.assert_array_equal(exact, want)
    assert 0 < np.abs(rounded - want).mean() < 0.1 * np.abs(want).mean()
    assert fingerprint(own) == fingerprint(same)
    # As a teacher it rounds, too.
    setting = prepare(Config(dataset=corners, teacher=str(run_dir)), teach=True)
    _, state = jax.eval_shape(setting.teacher.init, jax.random.key(0), x)
    assert set(state) == {"quantization"}


@pytest.mark.parametrize("method", ["backprop", "at", "fitnet"])
def test_every_method_runs_by_name(method, finished, corners, tmp_path):
    common = ("--dataset", corners, *TINY, "--run-dir", str(tmp_path / "run"))
    teacher = ("--teacher", str(finished / "teacher"))
    main(["distill", "--method", method, *teacher, *common])
    assert (tmp_path / "run" / "result.json").exists()


def test_suggest_measures_the_layers_of_a_run(finished, tmp_path, capsys):
    picture = tmp_path / "similar.png"
    main(["suggest", str(finished), "--images", "64", "--picture", str(picture)])
    out = capsys.readouterr().out
    lines = out.splitlines()
    columns = re.split(r"  +", lines[0])
    assert columns[:3] == ["hint layer", "depth", "shape"]
    rows = [re.split(r"  +", line) for line in lines[1:5]]
    assert [row[0] for row in rows] == ["conv1", "conv2", "maxpool2", "conv3"]
    assert [row[-1] for row in rows] == ["conv1", "conv2", "maxpool2", "conv3"]
    assert rows[1][1:3] == ["0.50", "8x8x64"] and rows[1][4] == "4,160"
    # Both networks are alike, but only the teacher is trained.
    assert "not trained" not in out
    assert re.search(
        r"^(suggested: conv[12]=conv[12]: |No layer passes)", out, re.MULTILINE
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_suggest_says_what_is_missing_and_what_is_wrong(
    corners, tmp_path, monkeypatch, capsys
):
    def measured(student, started, teacher, taught, batches, *, classes, pairs, **more):
        assert [len(batch["image"]) for batch in batches] == [8, 8]
        assert more == {"class_tokens": (0, 0)}
        assert classes == 4 and list(pairs) == [("conv2", "conv2")]
        shown = {"shape": (8, 8, 64), "cost": 0.5, "regressor": 9, "probe": 0.9}
        one = Candidate("conv2", "conv2", 0.5, 0.5, explained=0.95, **shown)
        return Measured((one,), 0.25, ("conv2",), ("conv2",), np.eye(2))

    monkeypatch.setattr("hintjax.experiments.suggestion.measure", measured)
    common = ("--dataset", corners, "--student", "hintjax.models:plain_wide")
    picture = ("--picture", str(tmp_path / "a.png"), "--images", "16")
    main(["suggest", *common, *picture])
    out = capsys.readouterr().out
    assert "The teacher is not trained" in out and "--teacher RUN_DIR" in out
    assert "No layer passes the rule. The usual pairs are conv2=conv2." in out
    assert "warning: conv2=conv2: a linear map of the untrained guided layer" in out


def test_labels_that_are_no_classes_are_not_probed(tmp_path, monkeypatch):
    file, random = tmp_path / "numbers.npz", np.random.default_rng(0)
    images = random.integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(file, image=images, label=random.normal(size=40).astype(np.float32))
    asked = []

    def measured(*networks, classes, **more):
        asked.append(classes)
        return Measured((), None, (), (), np.zeros((0, 0), np.float32))

    monkeypatch.setattr(suggestion, "measure", measured)
    wide = "hintjax.models:plain_wide"
    for task, dataset in (("regression", str(file)), ("classification", "digits")):
        config = Config(dataset=dataset, task=task, student=wide, devices=1)
        setting = prepare(config, teach=True)
        variables = setting.teacher.init(jax.random.key(0), setting.inputs)
        suggestion.measured(setting, variables, suggestion.some_batches(setting, 8))
    assert asked == [None, 10]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--picture", "a.pdf"], "a .png file in a directory that can be written, got"),
        (["--picture", "/no/such/a.png"], "can be written, got /no/such/a.png. Name"),
        (["--count", "0"], "count to be an integer >= 1, got 0"),
        (["--images", "0"], "images to be an integer >= 1, got 0"),
        (["nowhere"], "expected a file nowhere, got nothing"),
        (["--student", "hintjax.models:resnet21"], "resnet20"),
    ],
)
def test_suggest_refuses_bad_input_before_anything_is_measured(
    arguments, sentence, capsys, unchecked
):
    with pytest.raises(SystemExit) as stopped:
        main(["suggest", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_teacher_that_knows_little_is_named(finished, corners):
    config = Config(dataset=corners, teacher=str(finished), devices=1)
    setting = prepare(config, teach=True)
    trained = load_student(finished)[1]
    assert check_teacher(setting, trained) == 1.0  # without a warning
    # As if the teacher had been trained on inputs with another scale and sign.
    other = setting.dataset.standardize._replace(
        std=-100 * setting.dataset.standardize.std
    )
    wrong = setting._replace(dataset=setting.dataset._replace(standardize=other))
    with pytest.warns(UserWarning, match=r"a run: .* less than 50 %.*standardization"):
        assert check_teacher(wrong, trained) < 0.5


def test_the_comparison_shows_a_table_and_a_picture(
    corners, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "hintjax.experiments.comparison_picture._SHOWN", 25
    )  # test images; there are 24
    run_dir = tmp_path / "compare"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir))
    main(["distill", "--seeds", "2", "--rates", "0.001", *common])
    out = capsys.readouterr().out
    report = json.loads((run_dir / "report.json").read_text())
    arms = [row["arm"] for row in report["rows"]]
    assert arms[:4] == ["backprop", "KD", "AT", "FitNets"] and len(arms) == 6
    assert all(arm.split(",")[0] in out for arm in arms)
    assert all(len(row["seeds"]) == 2 and 0 <= row["r2"] <= 1 for row in report["rows"])
    assert report["compression"] == 1.0
    assert report["baseline"] in {"backprop", "KD", "AT"}
    assert (run_dir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (run_dir / "report.html").read_text()
    assert f"report: {run_dir / 'report.html'}" in out.replace("\n", "")
    assert all(f"<summary>{arm}</summary>" in page for arm in arms)
    assert page.count("ECE") >= 1 and page.count("Test examples by class") == 6
    assert f"against {report['baseline']}" in page
    # A finished run is not repeated.
    before = (run_dir / "KD" / "rate0.001-seed0" / "result.json").stat().st_mtime_ns
    main(["resume", str(run_dir)])
    after = (run_dir / "KD" / "rate0.001-seed0" / "result.json").stat().st_mtime_ns
    assert before == after
    assert json.loads((run_dir / "report.json").read_text()) == report


@pytest.mark.quick
def test_layers_lists_paths_and_shapes_in_order(capsys):
    main(["layers", "hintjax.models:plain_wide", "--shape", "8", "8", "1"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        *("conv1/conv", "conv1", "conv2/conv", "conv2", "maxpool2"),
        *("conv3/conv", "conv3", "pool", "classifier", ":out"),
    ]


@pytest.mark.quick
def test_layers_lists_models_of_every_kind(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_models.py").write_text(
        """
import hintjax as hj
from flax import nnx


class Small(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv(x).mean((1, 2)))


def by_hand(classes):
    def apply(params, state, x, train, key):
        return x.mean((1, 2, 3)), {"seen": x}, state

    return hj.function(apply, init=lambda key, x: ({}, {}))


def nothing(classes):
    return 3
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, first in (("Small", "conv"), ("by_hand", "seen")):
        main(["layers", f"their_models:{name}", "--shape", "8", "8", "1"])
        assert capsys.readouterr().out.split()[0] == first
    with pytest.raises(SystemExit):
        main(["layers", "their_models:nothing"])
    assert "to make a Flax Linen module" in capsys.readouterr().err


@pytest.mark.quick
def test_doctor_names_versions_devices_and_disk(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "jax", "flax", "device", "GiB free"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "fitnetz"], "expected a method, got 'fitnetz'. Nearest: fitnet"),
        (["--method", "kd", "--temperature", "0"], "temperature to be > 0, got 0"),
        (["--weight", "-1"], "weight to be >= 0, got -1"),
        (["--balance", "1"], "balance to be between 0 and 1, got 1"),
        (["--balance", "0.5", "--weight", "0"], "to balance them, got a weight of 0"),
        (["--balance", "0.5", "--method", "backprop"], "balanced, got backprop"),
        (["--weight", "0", "--task-weight", "0"], "a loss with a weight > 0"),
        (["--student", "hintjax.models:resnet21"], "resnet20"),
        (["--student", "nowhere.at:all"], "model: expected to import nowhere.at"),
        (["--student", "math:pi"], "called as pi(classes=...), got float"),
        (["--student", "os:getcwd"], "os:getcwd to be a factory"),
        (["--student", "hintjax.models:PlainCNN"], "got a factory that takes"),
        (["--student", "resnet20"], "expected student as package.module:factory"),
        (["--batch-size", "5000"], "batch_size"),
        (
            ["--batch-size", "20", "--devices", "8"],
            "batch_size that 8 devices can share evenly, got 20. ",
        ),
        (["--devices", "9"], "at most the devices that are here, got 9 of 8"),
        (["--fsdp", "3"], "fsdp to divide the devices, got 3 with 8"),
        (["--coordinator", "here:1"], "got no processes and no process"),
        (["--teacher", "no/such/run"], "expected a file"),
        (["--method", "fitnets", "--pairs", "conv99=conv2"], "Nearest: conv9"),
        (["--method", "fitnets", "--epochs", "1"], "one for each stage"),
        (
            ["--method", "fitnets", "--pairs", "conv1:in=conv1:in"],
            "parameters, got none through layer 'conv1:in'",
        ),
        (
            ["--method", "backprop", "--student", f"{__name__}:narrow"],
            "a student with an output for each of the 10 classes, got 9 outputs. ",
        ),
        (
            ["--method", "fitnets", "--teacher", f"{__name__}:narrow"],
            "a teacher with an output for each of the 10 classes, got 9 outputs. ",
        ),
        (["--dataset", "diggits"], "diggits"),
        (["--config", "nowhere.yaml"], "expected a file"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_trained(
    arguments, sentence, tmp_path, capsys, unchecked
):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *arguments, "--run-dir", str(run_dir)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not run_dir.exists() or not list(run_dir.iterdir())  # can be used again


OUTPUTS = """
import dataclasses

import flax.linen as nn


@dataclasses.dataclass
class Both:
    logits: object


class Model(nn.Module):
    classes: int
    form: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.classes, name="head")(x.mean((1, 2)))
        forms = {"tuple": (x, x), "dict": {"logits": x}, "flat": x[:, 0], "both": Both}
        form = forms[self.form]
        return form(x) if callable(form) else form


def tuple(classes):
    return Model(classes, "tuple")


def dict(classes):
    return Model(classes, "dict")


def flat(classes):
    return Model(classes, "flat")


def both(classes):
    return Model(classes, "both")
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tuple", "got tuple of 2 entries"),
        ("dict", "got dict with the entries ['logits']"),
        ("flat", "got the shape (1,)"),
        ("both", "got Both with the fields ['logits']"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused_before_anything_is_trained(
    name, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "their_outputs.py").write_text(OUTPUTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    run_dir = tmp_path / "run"
    for role, method in (("student", "backprop"), ("teacher", "kd")):
        arguments = [f"--{role}", f"their_outputs:{name}", "--method", method]
        with pytest.raises(SystemExit) as stopped:
            main(["distill", *arguments, "--run-dir", str(run_dir)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
        assert not run_dir.exists() or not list(run_dir.iterdir())


@pytest.mark.quick
def test_foreign_and_unwritable_run_directories_are_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for path, sentence in (
        (tmp_path, "with other files in it"),
        (tmp_path / "file" / "run", "that can be written"),
    ):
        with pytest.raises(SystemExit):
            main(["distill", "--run-dir", str(path)])
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.quick
def test_a_comparison_is_evaluated_only_when_it_is_finished(corners, tmp_path, capsys):
    save(Config(dataset=corners), tmp_path)
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path)])
    error = capsys.readouterr().err
    assert "evaluate: expected a finished comparison" in error
    assert f"hintjax resume {tmp_path}" in error


@pytest.mark.quick
def test_programs_are_kept_in_the_run_directory_unless_jax_was_told_where(tmp_path):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    try:
        jax.config.update(names[1], 7.0)
        keep_compiled(tmp_path / "run")
        assert [getattr(jax.config, name) for name in names] == [before[0], 7.0]
        jax.config.update(names[0], None)
        keep_compiled(tmp_path / "run")
        assert [getattr(jax.config, name) for name in names] == [
            *(str(tmp_path / "run"), 0.0),
        ]
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


@pytest.mark.quick
def test_the_help_of_distill_shows_every_field_of_a_config_by_subject(
    monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    out = capsys.readouterr().out
    titles = re.findall(r"^\W*(\w+) options\W*$", out, re.MULTILINE)
    subjects = ["method", "data", "networks", "schedule", "output", "hardware"]
    assert titles == [*subjects, "processes"]
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in out


@pytest.mark.quick
def test_sigint_is_a_sentence_and_130(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt("step 3 is saved")

    monkeypatch.setattr("hintjax.experiments.distill.prepare", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--method", "kd", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "hintjax: stopped. step 3 is saved\n"


@pytest.mark.quick
def test_a_run_that_learned_nothing_is_a_sentence_and_3(tmp_path, monkeypatch, capsys):
    def skipped(*_, **__):
        raise NothingLearned("fit: expected finite losses, got 3 skipped updates.")

    monkeypatch.setattr("hintjax.experiments.distill.prepare", skipped)
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--method", "kd", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 3
    said = "hintjax: fit: expected finite losses, got 3 skipped updates.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_first_ends_the_command_without_a_traceback(unbuffered):
    started = []
    for words in (["--help"], ["methods"]):
        nobody, output = os.pipe()
        os.close(nobody)
        command = [sys.executable, "-m", "hintjax.cli", *words]
        how = {"stdout": output, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        started.append(subprocess.Popen(command, env=environment, **how))
        os.close(output)
    for process in started:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (141, "")


@pytest.mark.quick
def test_another_broken_pipe_is_a_defect(monkeypatch):
    def broken(argv):
        raise BrokenPipeError("a socket")

    monkeypatch.setattr("hintjax.cli._run", broken)
    with pytest.raises(BrokenPipeError, match="a socket"):
        main(["methods"])


@pytest.mark.quick
def test_a_run_directory_in_use_is_one_sentence(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    refused = []

    def second():
        with pytest.raises(SystemExit) as ended:
            main(["distill", "--method", "kd", "--run-dir", str(tmp_path / "run")])
        refused.append(ended.value.code)

    with owned(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == [2]
    assert f"in use by process {os.getpid()} on" in capsys.readouterr().err


def test_a_changed_config_is_refused_with_its_difference(
    finished, corners, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    path = run_dir / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.01"))
    with pytest.raises(SystemExit):
        main(["resume", str(run_dir)])
    assert "learning_rate: 0.001 before, 0.01 now" in capsys.readouterr().err
    path.write_text(text.replace("checkpoint_every: 5", "checkpoint_every: 1"))
    with pytest.warns(UserWarning, match="checkpoint_every: 5 before, 1 now"):
        main(["resume", str(run_dir)])


def wait_for(condition, process):
    """Waits however long a busy machine takes; the process ends in any case."""
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"ended too early: {process.stderr.read()}")
        time.sleep(0.02)


def stages_saved(run_dir):
    records = run_dir.glob("checkpoints/*/hintjax.json")
    return {json.loads(path.read_text())["extra"]["now"]["phase"] for path in records}


def test_a_killed_run_resumes_to_the_same_bits_in_both_stages(
    corners, finished, tmp_path
):
    """SIGKILL in the hint stage, again in the distillation stage, then to the end."""
    command = [sys.executable, "-m", "hintjax.cli"]
    options = (
        *("--method", "fitnets", "--dataset", corners, *TINY, "--epochs", "30"),
        *("--checkpoint-every", "1", "--teacher", str(finished / "teacher")),
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # one device, as elsewhere
    cache = Path(__file__).parent.parent / ".jax_cache"
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    run_dir = tmp_path / "killed"

    def start(*arguments):
        return subprocess.Popen(
            [*command, *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = start("distill", *options, "--run-dir", str(tmp_path / "whole"))
    killed = start("distill", *options, "--run-dir", str(run_dir))
    for phase in (0, 1):
        wait_for(lambda p=phase: p in stages_saved(run_dir), killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert not (run_dir / "result.json").exists()
        killed = start("resume", str(run_dir))
    for process in (whole, killed):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert fingerprint(load_tree(run_dir / "student")) == fingerprint(
        load_tree(tmp_path / "whole" / "student")
    )
    results = [
        json.loads((path / "result.json").read_text())
        for path in (run_dir, tmp_path / "whole")
    ]
    for result in results:
        del result["seconds"], result["spent"]
    assert results[0] == results[1]
