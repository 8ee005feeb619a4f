"""A comparison: one teacher, several arms, the same seeds; a table and a picture.

Every arm has the same number of steps. Where an arm has several learning rates to
choose from, it runs with all of them, and the mean over the seeds on the validation
split decides. The test split decides nothing.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hintjax.experiments.explained import explained_by
from hintjax.experiments.factories import network
from hintjax.experiments.finished import RESULT, load_student
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting
from hintjax.networks import Variables
from hintjax.training.run_directory import inside
from hintjax.training.signals import stoppable

REPORT = "report.json"


class Arm(NamedTuple):
    """One way to train the student.

    Attributes:
        name: in the table.
        recipe: its phases.
        rates: the learning rates to choose from.
        initial: the factory of the module that initialises the student.
        untrained: whether its hints come from a teacher that was never trained.
        baseline: whether others are measured against it.
    """

    name: str
    recipe: Recipe
    rates: Sequence[float]
    initial: str
    untrained: bool = False
    baseline: bool = True


def compare(
    setting: Setting,
    run_dir: Path,
    arms: Sequence[Arm],
    teacher: Variables,
    *,
    begin: Callable[[str], Callable[..., None]],
) -> dict[str, Any]:
    """Runs all arms over all seeds; runs that are finished are not run again.

    Args:
        setting: data, networks, pairs.
        run_dir: each run has a directory in it.
        arms: what is compared; they differ in nothing else.
        teacher: its variables.
        begin: called with the name of each run; gives what `fit` calls to show it.

    Returns:
        For each arm its learning rate and, per seed, the results; with R^2.
    """
    classes = setting.dataset.classes
    initial = {arm.initial: network(arm.initial, classes) for arm in arms}
    untrained = setting.teacher.init(
        jax.random.key(setting.config.seed), setting.inputs
    )
    explained = explained_by(setting, teacher)

    def one(arm, rate, seed):
        path = inside(run_dir, f"{arm.name}/rate{rate:g}-seed{seed}")
        if not (path / RESULT).exists():
            run(
                setting,
                path,
                arm.recipe,
                teacher=teacher,
                hints=untrained if arm.untrained else None,
                initial=initial[arm.initial],
                learning_rate=rate,
                seed=seed,
                resume=True,
                show=begin(f"{arm.name}, rate {rate:g}, seed {seed}"),
            )
        return path, json.loads((path / RESULT).read_text())

    alone = setting.layout is None  # programs of one mesh must not cross
    first = setting.config.seed
    seeds = range(first, first + setting.config.seeds)
    jobs = [(arm, rate, seed) for arm in arms for rate in arm.rates for seed in seeds]
    done = dict(
        zip(
            [(arm.name, rate, seed) for arm, rate, seed in jobs],
            _side_by_side(one, jobs, setting.config.seeds if alone else 1),
            strict=True,
        )
    )
    found = {}
    for arm in arms:
        tried = {
            rate: [done[arm.name, rate, seed] for seed in seeds] for rate in arm.rates
        }
        validation = {
            rate: float(np.mean([result["validation/accuracy"] for _, result in runs]))
            for rate, runs in tried.items()
        }
        rate = max(validation, key=validation.get)
        found[arm.name] = {
            "rate": rate,
            "validation": {str(rate): value for rate, value in validation.items()},
            "test": [result["test/accuracy"] for _, result in tried[rate]],
            "seconds": [result["seconds"] for _, result in tried[rate]],
            "r2": [
                explained(load_student(path, hints_only=True)[1])
                for path, _ in tried[rate]
            ],
            "runs": [str(path.relative_to(run_dir)) for path, _ in tried[rate]],
        }
    return found


def _side_by_side(one, jobs, most):
    """All jobs, in their order; on a CPU, whose cores one small step cannot fill,
    several at a time. Each trains to the same bits as alone."""
    workers = min(os.cpu_count(), most) if jax.default_backend() == "cpu" else 1
    with stoppable():  # for all of them: signals come to the main thread
        pool = ThreadPoolExecutor(workers)
        try:
            return list(pool.map(lambda job: one(*job), jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C
