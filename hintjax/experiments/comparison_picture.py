"""The pictures of a comparison and of a run that show data."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hintjax.experiments.attachment import middle
from hintjax.experiments.explained import Images, image_batches, map_of, maps
from hintjax.experiments.finished import RESULT, load_student
from hintjax.experiments.setting import Setting, taught_by
from hintjax.losses import attention_map
from hintjax.networks import Network, Variables
from hintjax.processes import first, told
from hintjax.training import read_metrics

COMPARISON = "comparison.png"
ATTENTION = "attention.png"
_SHOWN = 6  # images in the picture
_FEW = 3  # images in the picture of one run


def picture(
    setting: Setting,
    run_dir: Path,
    teacher: Variables,
    report: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Draws comparison.png: curves, accuracies, and attention maps side by side.

    Args:
        setting: see `compare`.
        run_dir: directory of the runs and of the picture.
        teacher: variables of the teacher.
        report: result of `table`.
        found: result of `compare`.

    Returns:
        The path of the picture.
    """
    from hintjax.experiments import pictures

    guided, hint = middle(setting.places)[-1]
    dataset = setting.dataset
    per_epoch = dataset.train.n // setting.config.batch_size
    shown = np.arange(min(_SHOWN, dataset.test.n))
    images = list(image_batches(setting, dataset.test, shown))
    ours, theirs = setting.places.class_tokens
    attention_of = functools.partial(_attention_of, images)
    attention = {
        f"teacher {hint}": attention_of(taught_by(setting), hint, theirs, teacher)
    }
    for name, arm in found.items():
        student = load_student(run_dir / arm["runs"][0], hints_only=True)[1]
        attention[f"{name} {guided}"] = attention_of(
            setting.student, guided, ours, student
        )
    metric = setting.task.name
    fewer, known = report["compression"], report["teacher"][metric]
    history = functools.partial(_history, per_epoch, metric)
    figure = pictures.comparison(
        {
            name: [
                pictures.History(*told(functools.partial(history, run_dir / path)))
                for path in arm["runs"]
            ]
            for name, arm in found.items()
        },
        dataset.test.read(shown).image,
        attention,
        accuracies={name: arm["test"] for name, arm in found.items()},
        reference=None if math.isnan(known) else ("teacher", known),
        title=f"{report['dataset']}: {fewer:.0f} times fewer parameters",
        chance=report["chance"],
        metric=metric.replace("_", " "),
        percent=setting.task.larger,
    )
    path = run_dir / COMPARISON
    if first():
        figure.savefig(path)
    return path


def attention_picture(
    setting: Setting, run_dir: Path, teacher: Variables, guided: str, hint: str
) -> None:
    """Draws attention.png of a finished run: teacher, student, and their difference.

    Args:
        setting: setting of the run.
        run_dir: run directory.
        teacher: variables of the teacher.
        guided: path of the guided layer.
        hint: path of the hint layer.
    """
    from hintjax.experiments import pictures

    test = setting.dataset.test
    shown = np.arange(min(_FEW, test.n))
    images = list(image_batches(setting, test, shown))
    ours, theirs = setting.places.class_tokens
    student = load_student(run_dir, hints_only=True)[1]
    figure = pictures.attention(
        test.read(shown).image,
        _attention_of(images, taught_by(setting), hint, theirs, teacher),
        _attention_of(images, setting.student, guided, ours, student),
    )
    if first():
        figure.savefig(run_dir / ATTENTION)


def _attention_of(
    images: Sequence[Images],
    network: Network,
    path: str,
    class_tokens: int,
    variables: Variables,
) -> np.ndarray:
    """The attention maps of a layer for some images."""
    hints = maps(map_of(network, path, class_tokens), variables, images)
    height, width = hints.shape[1:3]
    return np.asarray(attention_map(hints)).reshape(-1, height, width)


def _history(
    per_epoch: int, metric: str, run_dir: Path
) -> tuple[list[float], list[float], float | None]:
    """The fields of a run's `History`, by epoch."""
    found = [
        (line["step"], value)
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name.startswith("validation/") and name.endswith(f"/{metric}")
    ]
    at, values = zip(*found, strict=True)
    *before, _ = json.loads((run_dir / RESULT).read_text())["boundaries"]
    boundary = before[-1] / per_epoch if before else None
    return [step / per_epoch for step in at], [*values], boundary
