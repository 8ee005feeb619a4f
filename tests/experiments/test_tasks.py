"""The tasks of the command: their labels, losses, metrics and forms of KD."""

import dataclasses
import json
import sys
import types
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax._checks import Refusal
from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments import phases, plan
from hintjax.experiments import run as training
from hintjax.experiments.comparison_table import show_table
from hintjax.experiments.config import Config
from hintjax.experiments.methods_table import CLASSES_ONLY, METHODS, RECIPES
from hintjax.experiments.setting import prepare
from hintjax.experiments.tasks import TASKS
from hintjax.models.blocks import GlobalAveragePool
from hintjax.networks import Features

N = 60
OTHERS = [name for name in TASKS if name != "classification"]
# The metric of each task, and the number of outputs of its data below.
METRIC = {
    "binary": ("accuracy", 1),
    "multi-label": ("f1", 3),
    "regression": ("absolute_error", 1),
    "dense": ("accuracy", 2),
}


class Net(nn.Module):
    """Three maps, the pooled vector, outputs."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        for number in range(1, 4):
            x = nn.relu(nn.Conv(self.width, (1, 1), name=f"conv{number}")(x))
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


class Segmenter(nn.Module):
    """Three maps, then the classes of each position."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        for number in range(1, 4):
            x = nn.relu(nn.Conv(self.width, (1, 1), name=f"conv{number}")(x))
        return nn.Conv(self.classes, (1, 1), name="classifier")(x)


def arrays(task):
    """Images whose corners are bright or dark, and labels that say so."""
    random = np.random.default_rng(0)
    image = random.integers(0, 60, (N, 4, 4), dtype=np.uint8)
    bright = random.random((N, 3)) < 0.5
    for corner, (row, column) in enumerate([(0, 0), (0, 3), (3, 0)]):
        image[bright[:, corner], row, column] = 255
    label = {
        "binary": bright[:, 0].astype(np.int64),
        "multi-label": bright.astype(np.uint8),
        "regression": bright.sum(1) * 2.5 + 10.0,
        "dense": np.where(image > 100, 1, 0).astype(np.uint8),
    }[task]
    if task == "dense":
        label[:, 1] = 255
    return {"image": image, "label": label}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Data of every task, and networks to import."""
    path = tmp_path_factory.mktemp("tasks")
    made = types.ModuleType("task_networks")
    made.thin = lambda classes: Net(2, classes)
    made.wide = lambda classes: Net(8, classes)
    made.thin_dense = lambda classes: Segmenter(2, classes)
    made.wide_dense = lambda classes: Segmenter(8, classes)
    for task in OTHERS:
        np.savez(path / f"{task}.npz", **arrays(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "task_networks", made)
        patch.chdir(path)
        yield path


def config_of(task, **given):
    dense = "_dense" if task == "dense" else ""
    usual = {
        "dataset": f"{task}.npz",
        "task": task,
        "student": f"task_networks:thin{dense}",
        "teacher": f"task_networks:wide{dense}",
        "batch_size": 8,
        "epochs": 2,
        "teacher_epochs": 1,
        "teacher_at_least": 0.0,
        "devices": 1,
        "seeds": 1,
    }
    return configs.check(Config(**usual | given))


def test_the_option_names_every_task():
    hints = typing.get_type_hints(Config)
    assert set(typing.get_args(hints["task"])) == set(TASKS)
    assert set(RECIPES) > CLASSES_ONLY


# Labels


@pytest.mark.parametrize("task", OTHERS)
def test_an_npz_file_has_the_labels_of_the_task(task):
    dataset = prepare(config_of(task)).dataset
    assert dataset.classes == METRIC[task][1] == len(dataset.class_names)
    label = dataset.train.label
    assert label.dtype == (np.float32 if task == "regression" else np.int32)
    assert label.shape[1:] == ((4, 4) if task == "dense" else (dataset.classes,))
    assert dataset.train.n + dataset.validation.n + dataset.test.n == N


@pytest.mark.parametrize(
    ("task", "label", "sentence"),
    [
        ("binary", np.arange(N) % 3, r"labels \[n\] of 0 and 1 in label of .* 2\."),
        ("binary", np.zeros((N, 2), int), r"labels \[n\] of 0 and 1 .*\(60, 2\) for"),
        ("multi-label", np.full((N, 3), 0.5), r"labels \[n k\] of 0 and 1, one for"),
        ("multi-label", np.zeros(N - 1, int), r"labels \[n k\] .* got int64 \(59, 1\)"),
        ("regression", np.full(N, np.nan), r"finite numbers \[n\] or \[n k\]"),
        ("regression", np.array(["a"] * N), r"finite numbers"),
        ("dense", np.arange(N) % 2, r"labels \[n h w\] of classes from 0, or 255"),
        ("dense", np.zeros((N, 4, 5), int), r"labels \[n h w\].*\(60, 4, 5\) for"),
        ("dense", np.full((N, 4, 4), -1), r"labels \[n h w\] .* between -1 and -1"),
        ("dense", np.full((N, 4, 4), 255), r"labels \[n h w\] of classes"),
    ],
)
def test_other_labels_are_refused_in_a_sentence(
    unchecked, task, label, sentence, tmp_path
):
    path = tmp_path / "other.npz"
    np.savez(path, image=arrays("binary")["image"], label=label)
    with pytest.raises(Refusal, match=f"load: expected {sentence}"):
        prepare(config_of(task, dataset=str(path)))


@pytest.mark.parametrize(
    ("task", "given", "sentence"),
    [
        ("dense", {"flip": True}, "no flip for dense"),
        ("dense", {"pad": 1}, "no pad for dense"),
        ("dense", {"size": 8}, "no size for dense"),
        ("regression", {"temperature": 2.0}, "no temperature for regression"),
        ("segmentation", {}, "task to be classification or binary or multi-label"),
    ],
)
def test_options_without_a_meaning_are_refused(task, given, sentence):
    with pytest.raises(Refusal, match=f"config: expected {sentence}"):
        configs.from_dict({"task": task, "dataset": "dense.npz", **given})


def test_only_classification_reads_other_datasets():
    with pytest.raises(Refusal, match=r"an \.npz file with labels .* got 'digits'"):
        prepare(config_of("binary", dataset="digits"))


# Methods


@pytest.mark.parametrize("task", OTHERS)
@pytest.mark.parametrize("name", ["kd", "fitnets"])
def test_methods_trace_with_the_loss_and_the_kd_of_the_task(task, name):
    setting = prepare(config_of(task, kd_weight=1.0), teach=True)
    *_, last = phases.check(setting, RECIPES[name])
    assert last.method.ignored == ((255,) if task == "dense" else ())


def test_the_kd_of_each_task_is_its_own():
    made = {name: task.kd(4.0) for name, task in TASKS.items()}
    student, teacher = jnp.ones((2, 3)), jnp.array([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]])
    batch = {"label": jnp.array([0, 255])}
    values = {}
    for name, method in made.items():
        shown = [Features(output=one) for one in (student, teacher)]
        context = hj.Context(jax.random.key(0), jnp.int32(0), True)
        values[name] = np.asarray(method.apply({}, {}, *shown, batch, context)[0])
    assert values["dense"][0] == values["classification"][0] and values["dense"][1] == 0
    np.testing.assert_array_equal(values["binary"], values["multi-label"])
    squared = np.square(student - teacher).mean(-1)
    np.testing.assert_allclose(values["regression"], squared, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(CLASSES_ONLY))
def test_methods_of_classes_are_refused_for_other_tasks(name):
    with pytest.raises(Refusal, match=f"a method for regression, got '{name}'"):
        plan.planned(config_of("regression", method=name))
    assert name in METHODS and plan.planned(Config(method=name)).recipes


def test_a_head_of_another_size_is_refused_in_a_sentence(unchecked, monkeypatch):
    """The cross-entropy of sigmoids would broadcast one label over all outputs."""
    wrong = lambda classes: Net(2, 5)
    monkeypatch.setattr(sys.modules["task_networks"], "thin", wrong)
    setting = prepare(config_of("binary"))
    with pytest.raises(Refusal, match=r"task: expected output .* \(8, 5\) and labels"):
        phases.check(setting, RECIPES["backprop"])


# Metrics


@pytest.mark.parametrize("name", TASKS)
def test_a_constant_prediction_has_the_metric_of_a_guess(name):
    task, random = TASKS[name], np.random.default_rng(0)
    if name == "classification":
        label = np.array([0, 1, 1, 2, 1], np.int32)
        constant = [0.0, 1.0, 0.0]
    elif name == "binary":
        label, constant = np.array([[0], [1], [1]], np.int32), [1.0]
    elif name == "multi-label":
        label = (random.random((50, 3)) < [0.1, 0.9, 0.6]).astype(np.int32)
        constant = [-1.0, 1.0, 1.0]
    elif name == "regression":
        label = random.normal(size=(51, 2)).astype(np.float32)
        constant = np.median(label, 0)
    else:
        label = np.array([[[0, 1], [1, 1]], [[1, 255], [255, 255]]], np.int32)
        label = np.repeat(label[:1], 2, 0)
        constant = [0.0, 1.0]
    wide = name == "classification" or name == "dense"
    shape = (*label.shape, len(constant)) if wide else label.shape
    output = jnp.broadcast_to(jnp.array(constant, jnp.float32), shape)
    total, count = task.measured(output, jnp.array(label), jnp.ones(len(label), bool))
    np.testing.assert_allclose(total / count, task.guessed(label), rtol=1e-5)
    assert not task.learned(task.guessed(label), task.guessed(label))
    assert task.learned(1.0 if task.larger else 0.0, task.guessed(label)) or (
        task.guessed(label) >= 0.5
    )


def test_examples_without_labels_are_not_measured():
    label = jnp.full((3, 2, 2), 255, jnp.int32).at[0].set(0).at[1, 0, 0].set(1)
    where = jnp.array([True, True, True])
    total, count = TASKS["dense"].measured(jnp.zeros((3, 2, 2, 2)), label, where)
    assert (float(total), int(count)) == (1, 2)


def test_an_error_is_better_when_it_is_smaller():
    error, share = TASKS["regression"], TASKS["classification"]
    assert (error.best({1: 0.5, 2: 0.3}), share.best({1: 0.5, 2: 0.3})) == (2, 1)
    assert error.skill(1.0, 4.0) == 0.75 and share.skill(0.9, 0.1) == 0.9
    assert error.shown(12.3456) == "12.35" and share.shown(0.1234) == "12.3"


# Runs


class Stopped(Exception):
    """Raised instead of training."""


def test_a_run_of_an_earlier_version_may_be_resumed(corners, tmp_path, monkeypatch):
    """Its checkpoint knows no task; the checkpoint of another task knows its own."""
    seen = []

    def fit(*arguments, identity, **how):
        seen.append(identity)
        raise Stopped

    monkeypatch.setattr("hintjax.experiments.run.fit", fit)
    for task in ("classification", "binary"):
        dataset = corners if task == "classification" else "binary.npz"
        config = config_of(task, dataset=dataset)
        with pytest.raises(Stopped):
            training.run(prepare(config), tmp_path / task, RECIPES["backprop"])
    assert ["task" in identity for identity in seen] == [False, True]


def run(task, path, *options):
    given = dataclasses.asdict(config_of(task, epochs=8, teacher_epochs=15))
    names = ("dataset", "task", "student", "teacher", "batch_size", "epochs", "devices")
    named = {name: given[name] for name in (*names, "teacher_epochs")}
    arguments = [
        part
        for name, value in named.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    more = ("--learning-rate", "0.02", "--teacher-at-least", "0", "--limit", "32")
    main(["distill", "--run-dir", str(path), *arguments, *more, *options])


def distilled(task, path, capsys):
    run(task, path, "--method", "kd", "--debug")
    found, (metric, _) = json.loads((path / "result.json").read_text()), METRIC[task]
    assert found[f"test/{metric}"] == found[f"test/task/{metric}"]
    assert {"test/kd", f"validation/{metric}"} <= set(found)
    capsys.readouterr()
    main(["eval", str(path)])
    printed = capsys.readouterr().out
    assert f"test {metric}: {found[f'test/{metric}']:.4f}" in printed
    return found[f"test/{metric}"]


def test_a_regression_is_distilled_and_measured_by_its_error(tmp_path, capsys):
    assert np.isfinite(distilled("regression", tmp_path / "run", capsys))


@pytest.mark.long
@pytest.mark.parametrize("task", ["binary", "multi-label", "dense"])
def test_every_task_is_distilled(task, tmp_path, capsys):
    assert 0 <= distilled(task, tmp_path / "run", capsys) <= 1


@pytest.mark.long
@pytest.mark.parametrize("task", ["regression", "dense"])
def test_methods_are_compared_by_the_metric_of_the_task(task, tmp_path, capsys):
    path = tmp_path / "run"
    compared = ("--compare", "backprop", "kd", "fitnets", "--seeds", "2")
    run(task, path, *compared, "--rates", "0.01", "0.001")
    report = json.loads((path / "report.json").read_text())
    name, _ = METRIC[task]
    assert report["task"] == task and report["teacher"][name] >= 0
    for arm in report["rows"]:
        values = {
            rate: np.mean(
                [
                    json.loads(one.read_text())[f"validation/{name}"]
                    for one in path.glob(f"{arm['arm']}/rate{rate:g}-seed*/result.json")
                ]
            )
            for rate in (0.01, 0.001)
        }
        best = (max if TASKS[task].larger else min)(values, key=values.get)
        assert arm["rate"] == best
    assert (path / "comparison.png").exists()
    capsys.readouterr()
    main(["eval", str(path)])
    assert f"test {name.replace('_', ' ')}" in capsys.readouterr().out


def test_reports_of_earlier_versions_are_shown(capsys):
    row = {"arm": "kd", "mean": 0.5, "std": 0.1, "seeds": [0.4, 0.6], "trained": 2}
    report = {
        "dataset": "digits",
        "teacher": {"accuracy": 0.987},
        "parameters": 10,
        "compression": 2.0,
        "baseline": "kd",
        "rows": [row | {"r2": 0.1, "seconds": 1.0, "rate": 0.001}],
        "differences": {
            "at": {"mean": 0.01, "low": -0.01, "high": 0.03, "told_apart": False}
        },
    }
    show_table(report)
    shown = capsys.readouterr().out
    assert "98.7" in shown and "50.0 ± 10.0" in shown and "above twice chance" in shown
    assert "+1.0 [-1.0, +3.0]  cannot be told apart" in shown
