"""The command `probe`: how much the features of a finished run know of some labels."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hintjax import pairing
from hintjax._checks import Refusal, message, positive_int
from hintjax.data import Dataset, Source, evaluation_batches, load
from hintjax.data.splits import stratified
from hintjax.experiments.attachment import Layers
from hintjax.experiments.config import Config
from hintjax.experiments.finished import (
    RESULT,
    evaluation_size,
    load_student,
    run_config,
)
from hintjax.experiments.setting import Setting, prepare, taught_by
from hintjax.experiments.teacher import teacher_of
from hintjax.experiments.teaching import teacher_variables
from hintjax.networks import Network, Variables, Wants
from hintjax.probes import knn_scores, linear_scores
from hintjax.similarity import pooled
from hintjax.training.run_directory import write_text

REPORT = "probe.json"
PARTS = (0.01, 0.1, 1.0)  # of the training labels
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_QUERIES = 256  # features that k-NN compares with all known ones at a time
_COLUMNS = ("network", "layer", "channels", "labels", "k-NN", "linear", "ridge")
_LEGEND = """\
labels: number of training examples whose label is used.
k-NN: test accuracy in percent of weighted k-NN (k {k}, temperature 0.07).
linear: test accuracy in percent of a linear probe in closed form.
ridge: penalty of the probe, in mean variances of a feature, chosen on validation."""


class _Probed(NamedTuple):
    """A network to probe, with the layer that is read; None for the output."""

    name: str
    network: Network
    variables: Variables
    layer: str | None


class _Features(NamedTuple):
    """Features of a split, and their labels."""

    rows: Array
    label: np.ndarray


def probe(
    run_dir: Path,
    dataset: str | None = None,
    data_dir: str | None = None,
    student_layer: str | None = None,
    teacher_layer: str | None = None,
    k: int = 20,
) -> None:
    """Measures the features of a run's student by k-NN and linear probes.

    The teacher and the untrained student stand beside the student. Each of them is
    measured with 1 %, 10 % and all of the training labels. Nothing is trained. The
    table is also written to probe.json in the run directory.

    Args:
        run_dir: run directory of a finished run.
        dataset: labeled dataset to use instead of that of the run, as in distill.
        data_dir: directory with prepared TensorFlow Datasets.
        student_layer: path of the student's layer to read, averaged over positions. By
            default the pooled vector, or the last map of a network without one.
        teacher_layer: path of the teacher's layer to read. By default the same.
        k: number of neighbors in k-NN.
    """
    positive_int("probe", k=k)
    path = run_dir.expanduser().resolve()
    # Any machine can measure, and with all labels.
    here = {"devices": 1, "fsdp": 1, "cache": False, "labels": None}
    config = dataclasses.replace(run_config(path), **here)
    setting = prepare(config, teach=config.method != "backprop")
    student = load_student(path, hints_only=True)
    data = _data(setting, dataset, data_dir)
    start = jax.random.split(jax.random.key(config.seed), 3)[0]  # as the run did
    untrained = setting.student.init(start, setting.inputs)
    ours = student_layer or layer_of(setting.places.student)
    networks = [
        _Probed("student", *student, ours),
        _Probed("untrained student", setting.student, untrained, ours),
    ]
    teacher = _teacher(setting, path)
    if teacher is not None:
        theirs = teacher_layer or layer_of(setting.places.teacher)
        networks.insert(1, _Probed("teacher", taught_by(setting), teacher, theirs))
    rows = [row for one in networks for row in _rows(one, data, config, k)]
    result = {
        "dataset": data.name,
        **{name: getattr(data, name).n for name in ("train", "validation", "test")},
        "classes": data.classes,
        "k": k,
        "rows": rows,
    }
    write_text(path / REPORT, json.dumps(result, indent=1))
    print("\n".join(_table(result)))


def _data(setting: Setting, dataset: str | None, data_dir: str | None) -> Dataset:
    """The labels to probe with, and images as the run's networks take them."""
    ours = setting.dataset
    if dataset is None:
        data = ours
    else:
        height, width, _ = ours.train.shape
        size = height if height == width else None
        data = load(dataset, data_dir, size=size)
        data = data._replace(standardize=ours.standardize)
    if not data.labeled or (dataset is None and setting.task.targets is not None):
        got = f"no labels in {data.name}"
        if data.labeled:
            got = f"labels for {setting.config.task}"
        do = "Name a dataset with labels by --dataset."
        raise Refusal(message("probe", "labels of classes", got, do))
    if data.train.shape != ours.train.shape:
        wanted = f"images of {ours.train.shape}, as in {ours.name}"
        got = f"{data.train.shape} in {data.name}"
        raise Refusal(message("probe", wanted, got))
    return data


def _teacher(setting: Setting, run_dir: Path) -> Variables | None:
    """The variables of the teacher; None if there is none, or none that is trained.

    A run of a comparison has its teacher in the directory of the comparison.
    """
    config = setting.config
    if setting.teacher is None:
        return None
    if not teacher_of(config.teacher, config.weights).trained_here:
        return teacher_variables(setting, run_dir)
    for above in (run_dir, *run_dir.parents[:2]):
        if (above / "teacher" / RESULT).exists():
            return load_student(above / "teacher")[1]
    return None


def layer_of(layers: Layers) -> str | None:
    """The layer of a network's features, which its head reads.

    The head itself says little: a hint stage does not train it.

    Args:
        layers: layers of the network.

    Returns:
        The path of the pooled vector, or else of the last map; None, the output, if
        there is no map either.
    """
    try:
        return pairing.head(layers)[0]
    except Refusal:
        maps = [path for path, layer in layers.items() if len(layer.shape) >= 3]
        return maps[-1] if maps else None


def _rows(
    probed: _Probed, data: Dataset, config: Config, k: int
) -> Iterator[dict[str, Any]]:
    """The results of one network, for each part of the labels."""
    train, validation, test = (
        _features(probed, split, data, config)
        for split in (data.train, data.validation, data.test)
    )
    n, classes = len(train.label), data.classes
    # With one label for each class, if there are so many.
    counts = dict.fromkeys(min(n, max(round(n * part), classes)) for part in PARTS)
    for count in counts:
        kept = stratified(train.label, count, 0)
        linear, ridge = _linear(train, validation, test, classes, kept)
        yield {
            "network": probed.name,
            "layer": probed.layer or "output",
            "channels": train.rows.shape[1],
            "labels": count,
            "knn": _knn(train, test, classes, kept, min(k, count)),
            "linear": linear,
            "ridge": ridge,
        }


def _features(
    probed: _Probed, split: Source, data: Dataset, config: Config
) -> _Features:
    """The pooled features of a whole split."""

    @jax.jit
    def shown(variables: Variables, image: Array | np.ndarray) -> Array:
        hints = () if probed.layer is None else (probed.layer,)
        wants = Wants(output=probed.layer is None, hints=hints)
        found, _ = probed.network.apply(*variables, image, wants=wants, train=False)
        return pooled(found.output if not hints else found.hints[hints[0]])

    rows, labels = [], []
    size = evaluation_size(split, config)
    for batch in evaluation_batches(split, size, data.standardize):
        valid = np.asarray(batch["where"])
        rows.append(np.asarray(shown(probed.variables, batch["image"]))[valid])
        labels.append(np.asarray(batch["label"])[valid])
    return _Features(jnp.asarray(np.concatenate(rows)), np.concatenate(labels))


def _knn(
    train: _Features, test: _Features, classes: int, kept: np.ndarray, k: int
) -> float:
    """The accuracy of weighted k-NN with the labels that are kept."""
    known, labels = train.rows[kept], jnp.asarray(train.label[kept])
    right = 0
    for start in range(0, len(test.label), _QUERIES):
        at = slice(start, start + _QUERIES)
        scores = knn_scores(test.rows[at], known, labels, classes=classes, k=k)
        right += int((np.asarray(scores).argmax(-1) == test.label[at]).sum())
    return right / len(test.label)


def _linear(
    train: _Features,
    validation: _Features,
    test: _Features,
    classes: int,
    kept: np.ndarray,
) -> tuple[float, float]:
    """The accuracy of the linear probe, and the ridge that validation chose."""
    where = jnp.zeros(len(train.label), bool).at[kept].set(True)  # of one shape
    both = jnp.concatenate([validation.rows, test.rows])
    labels = jnp.asarray(train.label)
    scored = jax.jit(linear_scores, static_argnames="classes")
    found = {}
    for ridge in RIDGES:
        how = {"classes": classes, "ridge": jnp.float32(ridge), "where": where}
        scores = scored(both, train.rows, labels, **how)
        right = np.asarray(scores).argmax(-1) == [*validation.label, *test.label]
        n = len(validation.label)
        found[ridge] = right[:n].mean(), right[n:].mean()
    # Of equally good penalties the largest: few labels fit too well.
    best = max(reversed(RIDGES), key=lambda ridge: found[ridge][0])
    return float(found[best][1]), best


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table."""
    yield (
        f"{result['dataset']}: {result['train']} training, {result['validation']} "
        f"validation and {result['test']} test examples of {result['classes']} classes"
    )
    lines: list[Sequence[str]] = [_COLUMNS]
    for row in result["rows"]:
        part = row["labels"] / result["train"]
        lines.append(
            (
                row["network"],
                row["layer"],
                f"{row['channels']}",
                f"{row['labels']} ({100 * part:.0f} %)",
                f"{100 * row['knn']:.1f}",
                f"{100 * row['linear']:.1f}",
                f"{row['ridge']:g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, second, *numbers in lines:
        shown = (f"{n:>{w}}" for n, w in zip(numbers, widths[2:], strict=True))
        yield "  ".join((f"{first:{widths[0]}}", f"{second:{widths[1]}}", *shown))
    yield _LEGEND.format(k=result["k"])
