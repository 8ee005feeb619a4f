"""Successive halving: candidates train from rung to rung, and the better half goes on.

The metric on the validation split decides. The test split is not read.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hintjax.experiments.finished import scorer
from hintjax.experiments.run import feed_of, phases_of, validation_of
from hintjax.experiments.setting import Setting
from hintjax.experiments.tasks import Task
from hintjax.experiments.tuning.crowd import Crowd, Shared, Standing, train
from hintjax.experiments.tuning.groups import Group, Plan
from hintjax.export import deployed, deployed_variables
from hintjax.networks import Variables
from hintjax.training.checkpoints import Checkpoints, open_checkpoints
from hintjax.training.run_directory import write_text
from hintjax.training.signals import Request

TUNING = "tuning.json"
STUDENTS = "students"  # states of the candidates
Score = Callable[[Variables, Iterable[Mapping[str, Any]]], float]


class Work(NamedTuple):
    """The parts that the candidates of all methods share.

    Attributes:
        setting: setting of the run, with the cache of the teacher if there is one.
        run_dir: run directory.
        teacher: variables of the teacher.
        shared: parts that their trainings share.
        validation: makes the batches of the validation split.
        score: metric of a student that stands alone.
        record: contents of tuning.json, which the training fills.
    """

    setting: Setting
    run_dir: Path
    teacher: Variables | None
    shared: Shared
    validation: Callable[[], Iterable[Mapping[str, Any]]]
    score: Score
    record: dict[str, Any]


def work_of(
    setting: Setting,
    run_dir: Path,
    teacher: Variables | None,
    request: Request,
    record: dict[str, Any],
) -> Work:
    """Makes the shared parts; the seed is that of one run of the same config.

    Args:
        setting: see `Work`.
        run_dir: see `Work`.
        teacher: see `Work`.
        request: see `Shared`.
        record: see `Work`.
    """
    config = setting.config
    initialize, feeding, fitting = jax.random.split(jax.random.key(config.seed), 3)
    feed = feed_of(setting, config, feeding)
    shared = Shared(
        feed=feed,
        student=setting.student.init(initialize, setting.inputs),
        key=fitting,
        seconds=config.checkpoint_seconds,
        request=request,
        spent=dict(record["spent"]),
    )
    score = scorer(setting.student, setting.task)
    validation = validation_of(setting)
    return Work(setting, run_dir, teacher, shared, validation, score, record)


def halve(work: Work, name: str, plan: Plan, show: Callable[[int], None]) -> None:
    """Trains the candidates of a method; what the record has is not trained again.

    Args:
        work: the shared parts.
        name: name of the method.
        plan: groups and rungs of its candidates.
        show: is called with the steps of all candidates so far.
    """
    tried, done, now = work.record["methods"][name], 0, None
    alive = list(range(len(tried)))
    for level, rung in enumerate(plan.rungs):
        if level:
            best = ranked(work.setting.task, tried, alive, level - 1)
            alive = best[: rung.candidates]
        for number, group in enumerate(plan.groups):
            members = [n for n in group.candidates if n in alive]
            begins = group.end(plan.rungs[level - 1]) if level else 0
            begins, ends = (n * plan.per_epoch for n in (begins, group.end(rung)))
            if any(len(tried[n]["validation"]) <= level for n in members):
                report = partial(_show, show, done, begins, len(members))
                folder = work.run_dir / STUDENTS / f"{name}-{number}"
                with open_checkpoints(folder) as checkpoints:
                    crowd = _crowd(work, group, checkpoints)
                    now = train(crowd, members, ends, report, now)
                    found = _validated(work, crowd, now)
                for n, value in found.items():
                    tried[n]["validation"][level:] = [value]
                    tried[n]["epochs"][level:] = [group.end(rung)]
                work.record["spent"] = dict(work.shared.spent)
                save(work.run_dir, work.record)
            if len(plan.groups) > 1:
                now = None  # the states of all groups may not fit into memory
            done += (ends - begins) * len(members)


def _show(
    show: Callable[[int], None], done: int, begins: int, count: int, at: int
) -> None:
    """Shows the steps of all candidates, where some of them have come to a step."""
    show(done + max(at - begins, 0) * count)


def _crowd(work: Work, group: Group, checkpoints: Checkpoints) -> Crowd:
    """The candidates of a group, with their phases and the one teacher."""
    setting, config = work.setting, work.setting.config
    per_epoch = work.shared.feed.per_epoch
    planned = group.recipe(config, setting.places, per_epoch)
    phases = phases_of(setting, config, planned, per_epoch, work.teacher)
    method = planned[-1].method
    return Crowd(work.shared, phases, method, group.candidates, checkpoints)


def _validated(work: Work, crowd: Crowd, now: Standing) -> dict[int, float]:
    """The metrics on the validation split of the networks that would be shipped."""
    setting, method = work.setting, crowd.method
    if method.deploy is None:
        score = work.score
    else:
        network = deployed(setting.student, setting.teacher, method)
        score = scorer(network, setting.task)
    others = method, setting.teacher, work.teacher, setting.inputs
    with work.shared.timed("evaluation"):
        return {
            number: score(deployed_variables(state, *others), work.validation())
            for number, state in now.states.items()
        }


def ranked(
    task: Task, tried: Sequence[Mapping[str, Any]], alive: Sequence[int], level: int
) -> list[int]:
    """Numbers of candidates, best first, by their metric at the end of a rung.

    Args:
        task: the task, which says whether a larger metric is better.
        tried: all candidates, as in tuning.json.
        alive: numbers of the candidates.
        level: number of the rung.
    """

    def badness(number: int) -> float:
        value = tried[number]["validation"][level]
        if math.isnan(value):
            return math.inf
        return -value if task.larger else value

    return sorted(alive, key=badness)


def save(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Writes tuning.json."""
    write_text(run_dir / TUNING, json.dumps(record, indent=1))
