"""A run's student is exported by the command, and measured in its programs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import numpy as np
import pytest

import hintjax
from hintjax import export
from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments import exporting, measuring
from hintjax.experiments.config import Config
from hintjax.experiments.evaluating import shipped
from hintjax.experiments.measuring import middle
from hintjax.networks import Wants

MISSING = [name for name in ("flatbuffers",) if find_spec(name) is None]
needs_flatbuffers = pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}")


@pytest.fixture(scope="module")
def finished(corners, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    main(
        [
            *("distill", "--method", "backprop", "--dataset", corners),
            *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
            *("--epochs", "1", "--devices", "1", "--run-dir", str(run_dir)),
        ]
    )
    return run_dir


def test_the_student_of_a_run_stands_alone(finished):
    setting, network, variables = shipped(finished)
    model = exporting.alone(setting, network, variables)
    assert model.about["classes"] == ["0", "1", "2", "3"]
    student = exporting.student_logits(setting, network, variables)
    file = exporting.file_logits(
        setting, lambda images: np.asarray(model.apply(images))
    )
    found = exporting.compared(setting, student, file)
    assert found.agree == found.images == setting.dataset.test.n
    assert 0 < found.difference < 1e-4
    assert found.metric == found.student
    wrong = exporting.compared(setting, student, -file)
    assert wrong.agree < wrong.images and wrong.metric < found.metric


@needs_flatbuffers
def test_the_command_writes_a_file_and_says_how_it_agrees(finished, capsys):
    main(["export", str(finished)])
    path = finished / "exported" / "student.stablehlo"
    out = capsys.readouterr().out
    assert out.startswith(f"file: {path}, {path.stat().st_size:,} bytes\n")
    n = shipped(finished)[0].dataset.test.n
    assert f"{n} of {n} test images have the student's class" in out
    assert export.description(path.read_bytes())["classes"] == ["0", "1", "2", "3"]
    setting, network, variables = shipped(finished)
    image = setting.dataset.test.read([0, 1]).image
    mean, std = setting.dataset.standardize
    inputs = jnp.asarray((image / np.float32(255) - mean) / std)
    wants = Wants(output=True)
    shown, _ = network.apply(*variables, inputs, wants=wants, train=False)
    found = export.load_stablehlo(path.read_bytes())(image)
    np.testing.assert_allclose(found, shown.output, atol=1e-4)


@needs_flatbuffers
def test_measure_writes_a_table(finished, tmp_path, capsys):
    one = tmp_path / "one.stablehlo"
    for batch, path in (("symbolic", None), ("1", one)):
        more = [] if path is None else ["--output", str(path)]
        main(["export", str(finished), "--batch", batch, *more])
    named = finished / "exported" / "student.stablehlo"
    capsys.readouterr()
    main(["measure", str(finished), str(named), "--repeats", "20"])
    report = json.loads((finished / "measured.json").read_text())
    (row,) = report["rows"]
    assert row["file"] == "student.stablehlo" and row["agreement"] == 1
    assert row["bytes"] == named.stat().st_size and row["arena"] is None
    assert row["ratio"]["median"] == 1 and row["milliseconds"]["median"] > 0
    assert row["accuracy"] == report["student"]["accuracy"]
    assert "student.stablehlo" in capsys.readouterr().out


@pytest.mark.quick
def test_programs_take_turns():
    seen = []
    runs = [lambda image, n=n: seen.append((n, image.shape)) for n in range(2)]
    times = measuring._timed(runs, np.zeros((3, 4, 4, 1), np.uint8), 5)
    assert times.shape == (2, 5) and (times > 0).all()
    assert seen == [(0, (1, 4, 4, 1)), (1, (1, 4, 4, 1))] * 8


@pytest.mark.quick
def test_the_interval_of_a_median_covers_it():
    draws = np.random.default_rng(0).exponential(size=(2000, 51))
    found = [middle(row) for row in draws]
    covered = [one.low <= np.log(2) <= one.high for one in found]
    assert 0.94 < np.mean(covered) < 0.98


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "tflite", "--batch", "symbolic"], "a number of images for tflite"),
        (["--to", "c-array", "--batch", "2"], "batch 1 for an int8 network, got 2"),
        (["--representative", "0"], "representative to be an integer >= 1"),
        ([], "expected"),
    ],
)
def test_a_refused_export_is_one_sentence(
    arguments, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(exporting, "need", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), *arguments])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.fixture
def without(monkeypatch):
    """No converter is installed, and the checkout is empty."""

    def checkout(path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(exporting, "CHECKOUT", path)

    return checkout


@pytest.mark.quick
def test_a_missing_converter_names_its_installation(without, tmp_path, capsys):
    without(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), "--to", "onnx"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "hintjax: export: expected the package jax2onnx, got no jax2onnx. "
        "`./setup.sh --export` installs all converters in .venv-export.\n"
    )


@pytest.mark.quick
def test_the_environment_of_the_converters_takes_over(without, tmp_path, capfd):
    python = tmp_path / ".venv-export" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "called with $@"\nexit 7\n')
    python.chmod(0o755)
    without(tmp_path)
    arguments = ["export", str(tmp_path), "--to", "onnx"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 7
    assert capfd.readouterr().out == (
        f"There is no jax2onnx here, so {python} runs the command.\n"
        f"called with -m hintjax.cli {' '.join(arguments)}\n"
    )


@pytest.mark.quick
def test_the_environment_of_the_converters_does_not_call_itself(
    without, tmp_path, monkeypatch
):
    python = tmp_path / ".venv-export" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    without(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv-export"))
    assert exporting.elsewhere([], export.NoConverter("got no onnx.")) is None


@pytest.mark.long
@pytest.mark.skipif(
    not (exporting.CHECKOUT / ".venv-export" / "bin" / "python").exists(),
    reason="no .venv-export; ./setup.sh --export makes it",
)
def test_every_format_is_exported_and_measured(finished, capfd):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "hintjax.cli"]

    def call(*arguments):
        return subprocess.run(
            [*command, *arguments],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    for name in exporting.FORMATS:
        said = call("export", str(finished), "--to", name)
        assert "test images have the student's class" in said
        assert ("rounding alone is 0.29" in said) == exporting.FORMATS[name].int8
    names = {path.name for path in (finished / "exported").iterdir()}
    assert names == {
        *("student.stablehlo", "student.onnx", "student.tflite", "student.c"),
        *("student-int8.tflite", "student.h"),
    }
    call("measure", str(finished), "--repeats", "20")
    rows = json.loads((finished / "measured.json").read_text())["rows"]
    found = {row["file"]: row for row in rows}
    assert set(found) >= {"student-int8.tflite", "student.onnx", "student.tflite"}
    for name, row in found.items():
        assert row["agreement"] == 1 or "int8" in name and row["agreement"] > 0.9


def test_of_a_comparison_the_run_is_exported_that_is_best_on_validation(
    tmp_path, capsys
):
    (tmp_path / "report.json").write_text("{}")
    configs.save(Config(), tmp_path)
    for name, value in {"kd/rate0.1-seed0": 0.5, "at/rate0.1-seed1": 0.75}.items():
        (tmp_path / name).mkdir(parents=True)
        results = {"validation/accuracy": value, "test/accuracy": 1 - value}
        (tmp_path / name / "result.json").write_text(json.dumps(results))
    best = tmp_path / "at" / "rate0.1-seed1"
    assert exporting.best_run(tmp_path) == best
    assert "at/rate0.1-seed1 (accuracy 75.0)" in capsys.readouterr().out
    assert exporting.best_run(best) == best


def test_a_comparison_whose_runs_are_gone_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    configs.save(Config(), tmp_path)
    with pytest.raises(hintjax.Refusal, match="the runs of the comparison, got none"):
        exporting.best_run(tmp_path)
