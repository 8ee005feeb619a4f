"""The picture of a comparison: its curves, its accuracies, and attention maps."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hintjax.experiments.attachment import middle
from hintjax.experiments.feature_maps import image_batches
from hintjax.experiments.finished import RESULT, load_student
from hintjax.experiments.report.attention import attention_of
from hintjax.experiments.setting import Setting, taught_by
from hintjax.networks import Variables
from hintjax.processes import first, told
from hintjax.training import read_metrics

COMPARISON = "comparison.png"
_SHOWN = 6  # images in the picture


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
    maps_of = functools.partial(attention_of, images)
    attention = {f"teacher {hint}": maps_of(taught_by(setting), hint, theirs, teacher)}
    for name, arm in found.items():
        student = load_student(run_dir / arm["runs"][0], hints_only=True)[1]
        attention[f"{name} {guided}"] = maps_of(setting.student, guided, ours, student)
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
