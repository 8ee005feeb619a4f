"""The runs of a comparison: one teacher, several arms, the same seeds.

Every arm has the same number of steps. An arm with several learning rates runs with
each of them, and the mean validation metric over the seeds chooses. The test split
chooses nothing.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hintjax.experiments.explained import explained_by
from hintjax.experiments.factories import student_network
from hintjax.experiments.finished import RESULT, load_student
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, taught_by
from hintjax.experiments.tasks import Task
from hintjax.networks import Variables
from hintjax.processes import told
from hintjax.training.run_directory import inside
from hintjax.training.signals import stoppable

REPORT = "report.json"


class Arm(NamedTuple):
    """One way to train the student.

    Attributes:
        name: name in the table.
        recipe: recipe of the phases.
        rates: learning rates to try.
        initial: factory of the module that initializes the student.
        untrained: whether the hints come from a teacher that was never trained.
        baseline: whether other arms are compared with this arm.
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
    """Runs all arms over all seeds, and skips the runs that are finished.

    Args:
        setting: data, networks and pairs.
        run_dir: directory with one directory for each run.
        arms: arms to compare; the runs differ in nothing else.
        teacher: variables of the teacher.
        begin: called with the name of each run; returns the run's `show`, see `fit`.

    Returns:
        For each arm the chosen learning rate and, per seed, the results and R^2.
    """
    jobs = [
        Job(arm, rate, setting.config.seed + number)
        for arm in arms
        for rate in arm.rates
        for number in range(setting.config.seeds)
    ]
    one = _runner(setting, run_dir, arms, teacher, begin)
    alone = setting.layout is None  # programs of one mesh must not cross
    results = side_by_side(one, jobs, setting.config.seeds if alone else 1)
    done = list(zip(jobs, results, strict=True))
    explained = explained_by(setting, teacher)

    def r2(path: Path) -> float:
        return explained(load_student(path, hints_only=True)[1])

    found = {}
    for arm in arms:
        tried = {rate: [] for rate in arm.rates}
        for job, ran in done:
            if job.arm.name == arm.name:
                tried[job.rate].append(ran)
        found[arm.name] = _chosen(tried, run_dir, r2, setting.task)
    return found


class Job(NamedTuple):
    """One run of a comparison."""

    arm: Arm
    rate: float
    seed: int


Ran = tuple[Path, dict[str, Any]]  # a run directory, and its result.json


def _runner(
    setting: Setting,
    run_dir: Path,
    arms: Sequence[Arm],
    teacher: Variables,
    begin: Callable[[str], Callable[..., None]],
) -> Callable[[Arm, float, int], Ran]:
    """Makes the function that runs one job, unless it is finished."""
    classes = setting.dataset.classes
    initial = {
        arm.initial: student_network(setting.config, classes, arm.initial)
        for arm in arms
    }
    key = jax.random.key(setting.config.seed)
    untrained = taught_by(setting).init(key, setting.inputs)

    def one(arm: Arm, rate: float, seed: int) -> Ran:
        path = inside(run_dir, f"{arm.name}/rate{rate:g}-seed{seed}")
        if not told((path / RESULT).exists):
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
        return path, told(lambda: json.loads((path / RESULT).read_text()))

    return one


def _chosen(
    tried: Mapping[float, Sequence[Ran]],
    run_dir: Path,
    r2: Callable[[Path], float],
    task: Task,
) -> dict[str, Any]:
    """The runs of an arm with the rate that is best on the validation split."""
    validation = {
        rate: float(np.mean([result[f"validation/{task.name}"] for _, result in runs]))
        for rate, runs in tried.items()
    }
    rate = task.best(validation)
    return {
        "rate": rate,
        "validation": {str(rate): value for rate, value in validation.items()},
        "test": [result[f"test/{task.name}"] for _, result in tried[rate]],
        "seconds": [result["seconds"] for _, result in tried[rate]],
        "r2": [r2(path) for path, _ in tried[rate]],
        "runs": [str(path.relative_to(run_dir)) for path, _ in tried[rate]],
    }


def side_by_side(
    one: Callable[..., Any], jobs: Sequence[Sequence[Any]], most: int
) -> list[Any]:
    """Runs all jobs, and returns their results in order.

    On a CPU several jobs run at a time, since one small step cannot fill the cores.
    Each job gives the same bits as alone.

    Args:
        one: function of a job, called with its parts.
        jobs: the jobs.
        most: largest number of jobs that run at a time.

    Returns:
        The results.
    """
    workers = min(os.cpu_count() or 1, most) if jax.default_backend() == "cpu" else 1
    with stoppable():  # for all jobs: signals come to the main thread
        pool = ThreadPoolExecutor(workers)
        try:
            return list(pool.map(lambda job: one(*job), jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or Ctrl-C
