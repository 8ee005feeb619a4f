"""Doubts about a run, in sentences that say what to do."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT
from hintjax.experiments.recipes import PlannedPhase
from hintjax.experiments.report.facts import Pair
from hintjax.experiments.setting import Setting
from hintjax.experiments.teacher import teacher_of
from hintjax.pairing import depth_of, doubts_of_depth, doubts_of_explained
from hintjax.training.run_directory import read_json

_OTHER = 0.1  # difference of statistics from which on images are others, in stds


def doubts_before(
    setting: Setting,
    phases: Sequence[PlannedPhase],
    pair: Pair | None,
) -> list[str]:
    """The doubts before training.

    Args:
        setting: setting of the run.
        phases: phases of the run, or of all runs of a comparison.
        pair: the pair of the run, if it was measured.
    """
    said = [*_too_deep(setting, phases), *_other_images(setting)]
    if pair is not None:
        found = doubts_of_explained(pair.before)
        said += [f"{pair.guided}={pair.hint}: {doubt}" for doubt in found]
    return said


def _too_deep(setting: Setting, phases: Sequence[PlannedPhase]) -> list[str]:
    """Warnings about the user's pairs, if they are deeper than FitNets' bound."""
    if not any(phase.hints_only for phase in phases):
        return []
    said = []
    for guided, hint in setting.places.pairs:
        ours = depth_of(setting.places.student, guided)
        theirs = depth_of(setting.places.teacher, hint)
        if ours is not None and theirs is not None:
            doubts = doubts_of_depth(ours, theirs)
            said += [f"{guided}={hint}: {doubt}" for doubt in doubts]
    return said


def _other_images(setting: Setting) -> list[str]:
    """A warning if a teacher from a run saw images with other statistics."""
    config = setting.config
    run_dir = teacher_of(config.teacher).run_dir
    if setting.teacher is None or run_dir is None:
        return []
    theirs = (read_json(run_dir / RESULT) or {}).get("standardize")
    return [] if theirs is None else standardized_apart(setting, theirs, config)


def standardized_apart(
    setting: Setting, theirs: Mapping[str, Sequence[float]], config: Config
) -> list[str]:
    """A warning if two networks learned on images that were standardized differently.

    Args:
        setting: setting of the run.
        theirs: `mean` and `std` of the images on which the teacher learned.
        config: config of the run.
    """
    ours = setting.dataset.standardize
    mean, std = (np.asarray(theirs[name], float) for name in ("mean", "std"))
    apart = np.max(np.abs(mean - np.asarray(ours.mean)) / np.asarray(ours.std))
    ratio = np.max(np.abs(np.log(std / np.asarray(ours.std))))
    if apart <= _OTHER and ratio <= _OTHER:
        return []
    own = [_list(np.asarray(values)) for values in ours]
    said = (
        f"teacher {config.teacher}: it learned on images of mean {_list(mean)} and "
        f"standard deviation {_list(std)}, and sees images that are standardized by "
        f"{own[0]} and {own[1]}. Its hints are doubtful: train a "
        f"teacher on these images, or give both runs the same dataset, size and range."
    )
    return [said]


def doubts_after(
    setting: Setting, teacher: float | None, students: Mapping[str, float]
) -> list[str]:
    """The doubts after training: a teacher that is worse than its student.

    Args:
        setting: setting of the run.
        teacher: metric of the teacher on the validation split, if it is known.
        students: metric of each student on the validation split, by its name.
    """
    if teacher is None or math.isnan(teacher) or not students:
        return []
    task = setting.task
    best = task.best(students)
    if task.best({"teacher": teacher, "student": students[best]}) == "teacher":
        return []
    if students[best] == teacher:
        return []
    unit = " %" if task.larger else ""
    said = (
        f"The teacher is worse than the student of {best} on the validation split: "
        f"{task.name} {task.shown(teacher)}{unit} against "
        f"{task.shown(students[best])}{unit}. Its outputs hold the student back: train "
        f"it longer (--teacher-epochs), choose a better one, or lower --weight."
    )
    return [said]


def _list(values: np.ndarray) -> str:
    return " ".join(f"{float(value):.3g}" for value in np.ravel(values))
