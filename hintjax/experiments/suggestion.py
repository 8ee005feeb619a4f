"""The command `suggest`: which layers to match, by measurement."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hintjax._checks import FileRefusal, message, positive_int
from hintjax.data import evaluation_batches, order
from hintjax.experiments.attachment import middle
from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT, evaluation_size, load_student
from hintjax.experiments.setting import Setting, prepare, taught_by
from hintjax.experiments.teacher import teacher_of
from hintjax.experiments.teaching import teacher_variables
from hintjax.networks import Variables
from hintjax.pairing import (
    Candidate,
    Choice,
    Measured,
    Seen,
    alignment,
    choose,
    measure,
    remarks,
    suggest_pairs,
)

_BATCH = 64  # images; the similarity keeps n^2 numbers for each layer
_PROBE = "probe"  # the column that needs labels
_LEGEND = {
    "FLOPs": "a step of the hint stage, of the FLOPs of both whole networks.",
    "regressor": "number of parameters of the default regressor.",
    _PROBE: "accuracy of a linear probe of the hint layer for the labels.",
    "CKA": "similarity to the layer in the line above; 1 says that one of both is "
    "redundant.",
    "R^2": "part of the hint that a linear map of an untrained guided layer explains.",
}
_LEAST = 4  # images: see `hintjax.similarity`


def suggest(
    config: Config,
    run_dir: Path | None,
    *,
    count: int = 1,
    images: int = 512,
    picture: Path = Path("suggest.png"),
) -> Measured:
    """Measures the layers of a teacher, prints a table, and suggests pairs.

    Args:
        config: config of a run.
        run_dir: its run directory: the teacher that was trained there is used, and the
            picture shows the trained student. None for a fresh student.
        count: number of pairs to suggest, at most.
        images: number of training images, at most.
        picture: file for the picture.

    Returns:
        The measurements.

    Raises:
        Refusal: if there are fewer than 8 images, or if the picture cannot be written.
    """
    positive_int("suggest", count=count, images=images)
    _check_picture(picture)
    path = None if run_dir is None else run_dir.expanduser().resolve()
    # Any machine can measure, and with all labels.
    here = dataclasses.replace(config, devices=1, fsdp=1, labels=None)
    setting = prepare(here, teach=True)
    teacher, trained = _teacher(setting, path)
    if not trained:
        print(
            "The teacher is not trained, so the table says little. Name a trained one: "
            "--teacher RUN_DIR, --weights FILE, or the directory of a run."
        )
    batches = some_batches(setting, images)
    used = middle(setting.places)
    found = measured(setting, teacher, batches, pairs=used)
    print("\n".join(_table(found)))
    chosen = choose(found, count=count)
    for one in chosen:
        print(f"suggested: {one.guided}={one.hint}: {one.reason}.")
    if not chosen:
        layers = setting.places.student, setting.places.teacher
        usual = [f"{g}={h}" for g, h in suggest_pairs(*layers, count=count)]
        print(f"No layer passes the rule. The usual pairs are {' '.join(usual)}.")
    for remark in remarks(found, used):
        print(f"warning: {remark}")
    shown, alike = "fresh student", found.alike
    if path is not None and (path / "student").exists():
        shown = "trained student"
        own = load_student(path, hints_only=True)[1]
        alike = alignment(
            Seen(taught_by(setting), teacher, found.teacher),
            Seen(setting.student, own, found.student),
            batches=batches,
        )
    _draw(found, alike, chosen, picture, f"CKA of teacher and {shown}")
    print(f"picture: {picture}")
    return found


def _teacher(setting: Setting, run_dir: Path | None) -> tuple[Variables, bool]:
    """The variables of the teacher, and whether it is trained; trains nothing."""
    config = setting.config
    if not teacher_of(config.teacher, config.weights).trained_here:
        return teacher_variables(setting, Path()), True
    if run_dir is not None and (run_dir / "teacher" / RESULT).exists():
        return load_student(run_dir / "teacher")[1], True
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return taught_by(setting).init(key, setting.inputs), False


def measured(
    setting: Setting,
    teacher: Variables,
    batches: Sequence[Mapping[str, Any]],
    *,
    pairs: Sequence[tuple[str, str]] = (),
) -> Measured:
    """Measures the layers of a teacher and of a fresh student, before any training.

    Without labels of classes there is no probe.

    Args:
        setting: setting of a run; the student is initialized from the config's seed.
        teacher: variables of the teacher.
        batches: the result of `some_batches`.
        pairs: (guided layer, hint layer) that are measured, too.

    Returns:
        The measurements.
    """
    student = setting.student.init(jax.random.key(setting.config.seed), setting.inputs)
    classified = setting.dataset.labeled and setting.task.targets is None
    return measure(
        setting.student,
        student,
        taught_by(setting),
        teacher,
        batches,
        classes=setting.dataset.classes if classified else None,
        pairs=pairs,
        class_tokens=setting.places.class_tokens,
    )


def some_batches(setting: Setting, images: int) -> Sequence[dict[str, Any]]:
    """An even number of batches of random training images.

    Args:
        setting: setting of a run.
        images: number of images, at most.

    Returns:
        The batches, with `where`.
    """
    train = setting.dataset.train
    index = np.asarray(order(jax.random.key(0), train.n))[:images]
    half = -(-len(index) // 2)
    size = max(_LEAST, min(_BATCH, half, evaluation_size(train, setting.config)))
    split = train.read(index)
    return list(evaluation_batches(split, size, setting.dataset.standardize))


def _table(measured: Measured) -> Iterator[str]:
    """The lines of the table, and the meaning of its columns."""
    at = {path: row for row, path in enumerate(measured.teacher)}
    rows, before = [], None
    for one in measured.candidates:
        row = at[one.hint]
        near = None if before is None else float(measured.alike[row, before])
        rows.append(_cells(one, near))
        before = row
    labeled = measured.chance is not None
    columns = [name for name in rows[0] if labeled or name != _PROBE]
    lines = [columns, *([cells[name] for name in columns] for cells in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *between, last in lines:
        numbers = (f"{n:>{w}}" for n, w in zip(between, widths[1:-1], strict=True))
        yield "  ".join((f"{first:{widths[0]}}", *numbers, last))
    for name, meaning in _LEGEND.items():
        if name in columns:
            yield f"{name}: {meaning}"


def _cells(one: Candidate, alike: float | None) -> dict[str, str]:
    """A line of the table by columns; `alike` is CKA to the line above, if any."""
    return {
        "hint layer": one.hint,
        "depth": f"{one.depth:.2f}",
        "shape": "x".join(map(str, one.shape)),
        "FLOPs": f"{one.cost:.1%}",
        "regressor": "none fits" if one.regressor is None else f"{one.regressor:,}",
        _PROBE: "" if one.probe is None else f"{one.probe:.1%}",
        "CKA": "" if alike is None else f"{alike:.2f}",
        "R^2": f"{one.explained:.2f}",
        "guided layer": one.guided,
    }


def _draw(
    measured: Measured,
    alike: np.ndarray,
    chosen: Sequence[Choice],
    file: Path,
    title: str,
) -> None:
    """Draws the similarities of the teacher's and the student's layers."""
    from hintjax.experiments import pictures

    teacher, student = measured.teacher, measured.student
    marked = [(teacher.index(one.hint), student.index(one.guided)) for one in chosen]
    cross = alike[: len(teacher), len(teacher) :]
    figure = pictures.heat_map(cross, teacher, student, marked=marked, title=title)
    figure.savefig(file.expanduser())


def _check_picture(file: Path) -> None:
    """Raises if the picture cannot be written, before anything is measured."""
    parent = file.expanduser().resolve().parent
    if file.suffix != ".png" or not os.access(parent, os.W_OK):
        wanted = "a .png file in a directory that can be written"
        raise FileRefusal(
            message("suggest", wanted, f"{file}", "Name it by --picture.")
        )
