"""The teacher of a run: trained, loaded, judged."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hintjax.experiments.config import Config
from hintjax.experiments.finished import RESULT, accuracy, load_student
from hintjax.experiments.recipes import backprop
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, prepare
from hintjax.networks import Variables
from hintjax.training.run_directory import read_json

_JUDGED = 1000  # validation examples on which a teacher is judged, at most


def teacher_variables(config: Config, run_dir: Path, **how: Any) -> Variables:
    """The teacher's variables: from the run that left them, or trained now.

    Args:
        config: of the run that needs a teacher.
        run_dir: of that run; a teacher that is trained goes to `run_dir/teacher`.
        **how: see `run`.
    """
    if ":" not in config.teacher:
        return load_student(config.teacher)[1]
    path = run_dir / "teacher"
    if read_json(path / RESULT) is None:
        own = dataclasses.replace(
            config,
            method="backprop",
            student=config.teacher,
            epochs=config.teacher_epochs,
            hint_epochs=None,
            limit=None,
            pairs=(),
            weight=None,
            task_weight=None,
            cosine=False,
        )
        run(prepare(own), path, backprop, resume=True, **how)
    return load_student(path)[1]


def check_teacher(setting: Setting, variables: Variables) -> float:
    """Warns about a teacher that knows little of the validation split.

    It is looked at whenever a run begins or goes on, and so with a few examples, which
    are spread over the split. Usually such a teacher was trained on inputs that were
    standardised otherwise, or on labels in another order; what its hints are worth is
    then doubtful.

    Args:
        setting: of the run.
        variables: the teacher's.

    Returns:
        Its accuracy.
    """
    config, dataset = setting.config, setting.dataset
    n = dataset.validation.n
    few = np.linspace(0, n - 1, min(n, _JUDGED)).astype(int)
    split = dataset.validation.read(few)
    found = accuracy(setting.teacher, variables, split, dataset.standardize)
    if found < config.teacher_at_least:
        warnings.warn(
            f"teacher {config.teacher}: {100 * found:.1f} % of {split.n} validation "
            f"examples are right, less than {100 * config.teacher_at_least:.0f} %. Was it trained "
            f"on inputs that were standardised in another way, or with other labels? "
            f"--teacher-at-least says what is enough.",
            stacklevel=2,
        )
    return found
