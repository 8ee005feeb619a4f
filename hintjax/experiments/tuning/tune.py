"""The command `tune`: the settings of a method that are best on the validation split.

All candidates have the same initial student, the same batches and one teacher, whose
features can be cached. Candidates that differ in numbers of the state train together as
a population. The others, such as those of other pairs, have a program of their own. The
test split is not read.

tuning.json in the run directory holds the candidates and all validated metrics. The
states of all candidates that still train are in a directory beside it, so a tuning that
was stopped goes on.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments.caching import CACHE, with_cache
from hintjax.experiments.config import Config
from hintjax.experiments.distill import COMPILED, keep_compiled, show_classes
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.standardizing import with_standardizations
from hintjax.experiments.teaching import check_teacher, teacher_variables
from hintjax.experiments.tuning.candidates import (
    Candidate,
    Over,
    candidate_of,
    candidates,
    parse_over,
    text_of,
)
from hintjax.experiments.tuning.groups import Plan, plan_of, settings_read
from hintjax.experiments.tuning.halving import STUDENTS, TUNING, halve, save, work_of
from hintjax.experiments.tuning.results import show_results, write_results
from hintjax.networks import Variables
from hintjax.training import progress
from hintjax.training.run_directory import owned
from hintjax.training.signals import stoppable


def tune(
    config: Config,
    run_dir: Path,
    over: Sequence[str],
    number: int = 16,
    most: int | None = None,
) -> None:
    """Tries settings of one method, or of several, in a run directory.

    Args:
        config: config of the run; the candidates replace some of its values.
        run_dir: run directory, made by `claim`.
        over: values of each setting; see `parse_over`.
        number: number of random draws.
        most: largest number of rungs; see `rungs`.

    Raises:
        Refusal: if there are no values, if the method does not read a setting, or if
            the config cannot be tuned.
    """
    overs = [parse_over(text) for text in over]
    if not overs:
        do = "E.g. --over weight=1..1000 learning_rate=0.001,0.01."
        raise Refusal(message("tune", "values of a setting in --over", "none", do))
    setting = _prepared(config)
    tried = {
        name: candidates(_read(setting, name, overs), number, config.seed)
        for name in _methods(config)
    }
    record = {
        "over": list(over),
        "rungs": most,
        "spent": {},
        "methods": {
            name: [
                {"settings": text_of(one), "epochs": [], "validation": []}
                for one in each
            ]
            for name, each in tried.items()
        },
    }
    with owned(run_dir):
        _tune(setting, config, run_dir, record)


def retune(run_dir: Path) -> None:
    """Continues a tuning where it stopped.

    Args:
        run_dir: its run directory.
    """
    path = run_dir.expanduser().resolve()
    config, record = configs.load(path), json.loads((path / TUNING).read_text())
    with owned(path):
        _tune(_prepared(config), config, path, record)


def _prepared(config: Config) -> Setting:
    """Data and networks, for one device; raises for a config that cannot be tuned."""
    if jax.process_count() > 1:
        raise Refusal(message("tune", "one process", f"{jax.process_count()}"))
    for name in ("balance", "patience", "debug", "rates"):
        if getattr(config, name):
            do = "Leave it out here."
            raise Refusal(message("tune", f"no --{name}", "a value of it", do))
    teach = any(name != "backprop" for name in _methods(config))
    setting = prepare(dataclasses.replace(config, devices=1, fsdp=1), teach=teach)
    if not setting.dataset.labeled:
        wanted = f"labels in {config.dataset}, to choose by a metric of labels"
        raise Refusal(message("tune", wanted, "none"))
    return setting


def _methods(config: Config) -> Sequence[str]:
    """The names of the methods that are tuned."""
    names = config.compare if config.method is None else (config.method,)
    if not names:
        do = "Name one with --method, or several with --compare."
        raise Refusal(message("tune", "a method", "none", do))
    return names


def _read(setting: Setting, name: str, overs: Sequence[Over]) -> list[Over]:
    """The settings that a method reads; the others would change nothing.

    Raises:
        Refusal: if the only method does not read one of them.
    """
    config = setting.config
    values = {over.name: over.values[-1] for over in overs}
    read = settings_read(setting, name, configs.with_settings(config, values))
    unread = [over.name for over in overs if over.name not in read]
    if unread and config.method is not None:
        do = f"It reads {', '.join(sorted(read))}."
        wanted = f"settings that {name} reads"
        raise Refusal(message("tune", wanted, ", ".join(unread), do))
    if unread:
        print(f"{name}: it does not read {', '.join(unread)}, which is left out")
    return [over for over in overs if over.name in read]


def _tune(
    setting: Setting, config: Config, run_dir: Path, record: dict[str, Any]
) -> None:
    """Trains what is missing in the record, chooses, and writes the results."""
    show_classes(setting)
    plans = {
        name: plan_of(setting, name, tried, record["rungs"])
        for name, tried in _tried(record).items()
    }
    configs.save(config, run_dir)
    save(run_dir, record)
    keep_compiled(run_dir / COMPILED)
    epochs = sum(plan.epochs() for plan in plans.values())
    for name, plan in plans.items():
        parts = ", ".join(
            f"{rung.candidates} up to epoch {plan.groups[0].end(rung)}"
            for rung in plan.rungs
        )
        print(f"{name}: candidates {parts}; programs: {len(plan.groups)}")
    per_epoch = next(iter(plans.values())).per_epoch
    with (
        stoppable() as request,
        progress(
            epochs * per_epoch, "tune", images_per_step=config.batch_size
        ) as report,
    ):
        runs, teacher = _taught(setting, run_dir, plans, record)
        work, done = work_of(runs, run_dir, teacher, request, record), 0
        for name, plan in plans.items():
            halve(work, name, plan, lambda at, n=name, d=done: report(d + at, None, n))
            done += plan.epochs() * per_epoch
    rows = write_results(setting, config, run_dir, record)
    show_results(rows, run_dir, record)
    shutil.rmtree(run_dir / STUDENTS, ignore_errors=True)


def _tried(record: Mapping[str, Any]) -> dict[str, list[Candidate]]:
    """The candidates of all methods, from their texts."""
    return {
        name: [candidate_of(one["settings"]) for one in tried]
        for name, tried in record["methods"].items()
    }


def _taught(
    setting: Setting, run_dir: Path, plans: Mapping[str, Plan], record: dict[str, Any]
) -> tuple[Setting, Variables | None]:
    """The setting with its one cache, and the one teacher of all candidates."""
    if setting.teacher is None:
        return setting, None
    teacher = teacher_variables(setting, run_dir)
    check_teacher(setting, teacher)
    recipes = [group.recipe for plan in plans.values() for group in plan.groups]
    ready = with_standardizations(setting, recipes, teacher)
    if setting.config.cache:
        start = time.perf_counter()
        ready = with_cache(ready, run_dir / CACHE, recipes, teacher)
        spent = record["spent"].get("cache", 0.0) + time.perf_counter() - start
        record["spent"]["cache"] = spent
    return ready, teacher
