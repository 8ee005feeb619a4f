"""The variables of a teacher: trained or loaded, and then judged."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hintjax.data import Dataset, Split
from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT, evaluation_size, load_student, score
from hintjax.experiments.pretrained import pretrained
from hintjax.experiments.recipes import backprop
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, prepare, taught_by
from hintjax.experiments.teacher import teacher_of
from hintjax.networks import Variables
from hintjax.training.run_directory import read_json

_JUDGED = 1000  # validation examples on which a teacher is judged, at most


def teacher_variables(setting: Setting, run_dir: Path, **how: Any) -> Variables:
    """The variables of the teacher: from its run or its file, or trained now.

    Args:
        setting: setting of the run that needs a teacher.
        run_dir: directory of this run; a teacher is trained in `run_dir/teacher`.
        **how: see `run`.
    """
    config = setting.config
    teacher = teacher_of(config.teacher, config.weights)
    if teacher.run_dir is not None:
        return load_student(teacher.run_dir)[1]
    if teacher.weights is not None:
        dataset = setting.dataset
        return pretrained(
            config.teacher,
            teacher.weights,
            dataset.classes,
            setting.inputs,
            dataset.standardize,
        )[1]
    path = run_dir / "teacher"
    if read_json(path / RESULT) is None:
        own = dataclasses.replace(
            config,
            method="backprop",
            student=teacher.factory,
            epochs=config.teacher_epochs,
            hint_epochs=None,
            limit=None,
            labels=None,
            pairs=(),
            weight=None,
            task_weight=None,
            balance=None,
            cosine=False,
            layer_rates=(),
            quantize=False,
        )
        run(prepare(own), path, backprop, resume=True, **how)
    return load_student(path)[1]


def check_teacher(setting: Setting, variables: Variables) -> float | None:
    """Warns about a teacher that knows little of the validation split.

    The teacher is judged whenever a run starts or resumes. So only a few examples are
    used, which are spread over the split. The usual cause is a teacher that was trained
    on inputs with another standardization, or on labels in another order. Then its
    hints are doubtful.

    Args:
        setting: setting of the run.
        variables: variables of the teacher.

    Returns:
        Metric of the teacher; None if there are no labels, or if it knows other
        classes, so that only its hints are used.
    """
    config, dataset = setting.config, setting.dataset
    if not dataset.labeled:
        print(f"teacher {config.teacher}: without labels, it is not judged")
        return None
    _compare_names(config, dataset)
    if not setting.places.same_outputs:
        print(f"teacher {config.teacher}: it knows other classes, so it is not judged")
        return None
    n = dataset.validation.n
    few = np.linspace(0, n - 1, min(n, _JUDGED)).astype(int)
    split = dataset.validation.read(few)
    where = (split, dataset.standardize, evaluation_size(split, config))
    task = setting.task
    found = score(taught_by(setting), variables, *where, task)
    skill = task.skill(found, task.guessed(np.asarray(split.label)))
    if skill < config.teacher_at_least:
        warnings.warn(
            f"teacher {config.teacher}: {_judged(setting, found, split)}. "
            f"Was the teacher trained on inputs with another standardization, or with "
            f"other labels? "
            f"--teacher-at-least sets the lowest {task.name} without this warning.",
            stacklevel=2,
        )
    return found


def _judged(setting: Setting, found: float, split: Split) -> str:
    """What is wrong with a teacher, in words."""
    task, enough = setting.task, setting.config.teacher_at_least
    if task.targets is None:
        right = f"{100 * found:.1f} % of {split.n} validation examples are right"
        return f"{right}, less than {100 * enough:.0f} %"
    of = f"{task.name} {task.shown(found)} on {split.n} validation examples"
    if task.larger:
        return f"{of}, less than {100 * enough:.0f} (in percent)"
    median = task.guessed(np.asarray(split.label))
    return f"{of}, and the median has {task.shown(median)}"


def _compare_names(config: Config, dataset: Dataset) -> None:
    """Warns if a teacher from a run has as many classes, but with other names."""
    run_dir = teacher_of(config.teacher).run_dir
    if run_dir is None:
        return
    theirs = (read_json(run_dir / RESULT) or {}).get("class_names")
    ours = list(dataset.class_names)
    if theirs is not None and len(theirs) == len(ours) and theirs != ours:
        at = next(i for i, name in enumerate(ours) if theirs[i] != name)
        warnings.warn(
            f"teacher {config.teacher}: its class {at} is named {theirs[at]}, and "
            f"class {at} of {dataset.name} is named {ours[at]}. Are these the same "
            f"classes, in the same order?",
            stacklevel=3,
        )
