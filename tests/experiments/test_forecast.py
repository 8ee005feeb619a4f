"""Before a run: a dry run shows its cost, and a step that does not fit is refused."""

import logging

import jax
import pytest

from hintjax.cli import main
from hintjax.experiments import forecast
from hintjax.experiments.config import Config
from hintjax.experiments.recipes import KD
from hintjax.experiments.run import feed_of
from hintjax.experiments.setting import prepare

TINY = (
    *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
    *("--epochs", "4", "--teacher-epochs", "1", "--devices", "1"),
)


@pytest.fixture(scope="module")
def setting(corners):
    """The setting of the command with `TINY`."""
    given = {"student": "hintjax.models:plain_wide", "devices": 1}
    return prepare(Config(dataset=corners, method="kd", **given), teach=True)


@pytest.fixture(scope="module")
def feed(setting):
    return feed_of(setting, setting.config, jax.random.key(0))


@pytest.fixture(scope="module")
def step(setting, feed):
    """The compiled step of KD."""
    (step,) = forecast.compiled_steps(setting, [KD], feed)
    return step


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    corners, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common = ("--dataset", corners, *TINY)
    main(["distill", "--method", "at", "--cache", "--dry-run", *common])
    said = capsys.readouterr().out
    for line in (
        *("student hintjax.models:plain_wide: ", "teacher hintjax.models:plain_wide: "),
        *("parameters", "MFLOP per image forward", "MFLOP per image in a step"),
        *("MB of memory", "ms per step", "s per epoch of", "cache: 320 bytes per view"),
        *(
            "needed, ",
            "available",
            "on disk, at most, for 1 run\n",
            "attention_transfer: student",
        ),
    ):
        assert line in said, line
    assert not list(tmp_path.iterdir())


def test_training_does_not_compile_a_checked_step_again(setting, feed, step, caplog):
    def trained(setting):
        (made,) = forecast.phases_of(setting, setting.config, *planned)
        student, teacher = (
            network.init(jax.random.key(0), setting.inputs)
            for network in (setting.student, setting.teacher)
        )
        state = forecast._begun([made], feed, 0, teacher, student, None)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            feed.advance(made.program, state, teacher, 0, 1)
        return [text for text in caplog.messages if "Compiling jit(body)" in text]

    per_epoch = feed.per_epoch
    planned = KD(setting.config, setting.places, per_epoch), per_epoch, None
    assert trained(setting) == []
    assert len(trained(setting._replace(programs={}))) == 1


def test_a_step_that_does_not_fit_names_micro_batches_that_fit(
    setting, step, corners, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir))
    monkeypatch.setattr(forecast, "available", lambda: step.nbytes - 1)
    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--method", "kd", *common])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "for kd, batch 16. Use --accumulate 2, or --batch-size 8." in said
    assert not (run_dir / "teacher").exists()


def test_without_micro_batches_that_fit_a_smaller_network_is_proposed(
    setting, monkeypatch
):
    monkeypatch.setattr(forecast, "available", lambda: 1000)
    few = setting._replace(config=setting.config.__class__(batch_size=2))
    with pytest.raises(ValueError, match="Use a smaller student or teacher"):
        forecast.check_memory(few, [KD])


def test_an_accelerator_has_the_memory_that_it_tells(monkeypatch):
    class Device:
        platform = "gpu"

        def __init__(self, told):
            self.told = told

        def memory_stats(self):
            return self.told

    for told, known in (({"bytes_limit": 7}, 7), ({}, None), (None, None)):
        monkeypatch.setattr(jax, "local_devices", lambda told=told: [Device(told)])
        assert forecast.available() == known
    monkeypatch.undo()
    assert forecast.available() is None or forecast.available() > 2**20
