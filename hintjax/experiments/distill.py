"""The commands `distill` and `resume`: the runs of a run directory."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments.attachment import Places
from hintjax.experiments.caching import CACHE, with_cache
from hintjax.experiments.comparison import REPORT, compare
from hintjax.experiments.comparison_picture import picture
from hintjax.experiments.comparison_table import max_validated, show_table, table
from hintjax.experiments.config import Config
from hintjax.experiments.doubts import doubts_after, doubts_before
from hintjax.experiments.finished import run_config
from hintjax.experiments.forecast import check_memory, show_forecast
from hintjax.experiments.launch.ending import training_begins
from hintjax.experiments.phases import check, check_balance
from hintjax.experiments.plan import Plan, planned
from hintjax.experiments.pretrained import recorded
from hintjax.experiments.recipes import PlannedPhase
from hintjax.experiments.report.drawn import drawing
from hintjax.experiments.report.end_of_run import arm_facts, report_run, written
from hintjax.experiments.report.facts import Pair, pair_of
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.standardizing import with_standardizations
from hintjax.experiments.teacher import teacher_of
from hintjax.experiments.teaching import check_teacher, teacher_variables
from hintjax.networks import Variables
from hintjax.processes import agree, first
from hintjax.training import progress
from hintjax.training.remarks import remark
from hintjax.training.run_directory import LOCK, inside, owned, write_text

COMPILED = "compiled"  # programs, in the run directory


def distill(config: Config, run_dir: Path, *, resume: bool = False) -> None:
    """Runs one method, or a comparison of methods, in a run directory.

    Args:
        config: config of the run.
        run_dir: run directory, made by `claim`.
        resume: whether to continue a run that stopped.
    """
    agree("config", _shared(config))
    with owned(run_dir), contextlib.ExitStack() as silence:
        if not first():
            nowhere = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        keep_compiled(run_dir / COMPILED)
        _distill(config, run_dir, resume)


def _shared(config: Config) -> dict[str, Any]:
    """Versions and fields that are the same in all processes; data_dir may differ."""
    versions = {name: importlib.metadata.version(name) for name in ("hintjax", "jax")}
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name != "data_dir"} | versions


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in a folder, for resuming, unless JAX has another folder.

    Programs that compile in less than a second are kept, too: there are hundreds.
    """
    there = first() or folder.parent.exists()
    if there and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


Begin = Callable[[str], Callable[..., None]]  # the `show` of a run, from its name


class Work(NamedTuple):
    """A plan that is checked against its data and networks.

    Attributes:
        setting: data and networks.
        plan: the runs.
        phases: phases of all recipes.
        run_dir: run directory.
        resume: whether the work continues.
    """

    setting: Setting
    plan: Plan
    phases: Sequence[PlannedPhase]
    run_dir: Path
    resume: bool


def _checked(config: Config) -> tuple[Setting, Plan, Sequence[PlannedPhase]]:
    """Checks the plan of a config, and prints the layers that it compares."""
    plan = planned(config)
    setting = prepare(config, teach=config.method != "backprop")
    show_classes(setting)
    if plan.arms and not setting.dataset.labeled:
        wanted = f"labels in {config.dataset}, to compare methods"
        do = "Name one method, e.g. --method dense_matching."
        raise Refusal(message("distill", wanted, "none", do))
    phases = [phase for recipe in plan.recipes for phase in check(setting, recipe)]
    check_balance(config, phases)
    for phase in {phase.name: phase for phase in phases}.values():
        _show(phase, setting.places)
    return setting, plan, phases


def _distill(config: Config, run_dir: Path, resume: bool) -> None:
    """Checks and runs the plan of a config in a run directory that is owned."""
    config = recorded(config)
    work = Work(*_checked(config), run_dir, resume)
    if not resume:
        configs.save(config, run_dir)
        check_memory(work.setting, work.plan.recipes)
    if work.plan.arms:
        _run_arms(work)
    else:
        _run_alone(work)


@contextlib.contextmanager
def _showing(work: Work) -> Iterator[Begin]:
    """Shows the progress of all runs together."""
    images = work.setting.config.batch_size
    with progress(_total_steps(work), "hintjax", images_per_step=images) as report:
        training_begins()
        yield _counting(report)


def _run_alone(work: Work) -> None:
    """Runs the only recipe of a plan, and writes the report."""
    setting, (recipe,) = work.setting, work.plan.recipes
    with _showing(work) as begin:
        teacher, known, ready = None, None, setting
        if setting.teacher is not None:
            teacher, known = _taught(work, begin)
        pair = _doubted(work, teacher)
        if teacher is not None:
            ready = _with_teacher(work, teacher)
        how = {"teacher": teacher, "resume": work.resume, "show": begin("student")}
        fitted, result = run(ready, work.run_dir, recipe, **how)
        print(fitted.account())
        metric = f"validation/{setting.task.name}"
        own = {work.phases[-1].name: result[metric]} if metric in result else {}
        remark(work.run_dir, doubts_after(setting, known, own))
        report_run(setting, work.run_dir, recipe, teacher, pair)


def _run_arms(work: Work) -> None:
    """Runs all arms of a comparison; writes its table, its picture and the report."""
    setting, run_dir, arms = work.setting, work.run_dir, work.plan.arms
    with _showing(work) as begin:
        teacher, known = _taught(work, begin)
        _doubted(work, teacher)
        ready = _with_teacher(work, teacher)
        found = compare(ready, run_dir, arms, teacher, begin=begin)
    baselines = [arm.name for arm in arms if arm.baseline] or [arms[0].name]
    result = table(setting, teacher, found, baselines)
    write_text(run_dir / REPORT, json.dumps(result, indent=1))
    show_table(result)
    if drawing():
        print(f"picture: {picture(setting, run_dir, teacher, result, found)}")
    arm_facts(setting, run_dir, arms, teacher, found)
    own = {name: max_validated(setting.task, arm) for name, arm in found.items()}
    remark(run_dir, doubts_after(setting, known, own))
    print(f"report: {written(run_dir)}")


def _taught(work: Work, begin: Begin) -> tuple[Variables, float | None]:
    """The teacher's variables, trained if they are missing, and its metric."""
    variables = teacher_variables(work.setting, work.run_dir, show=begin("teacher"))
    return variables, check_teacher(work.setting, variables)


def _doubted(work: Work, teacher: Variables | None) -> Pair | None:
    """Notes doubts before the training; returns the pair of the report."""
    hints = any(phase.method.student.hints for phase in work.phases)
    pair = None if work.resume or not hints else pair_of(work.setting, teacher)
    remark(work.run_dir, doubts_before(work.setting, work.phases, pair))
    return pair


def _with_teacher(work: Work, teacher: Variables) -> Setting:
    """The setting with the teacher's statistics and cache, which are computed once."""
    ready = with_standardizations(work.setting, work.plan.recipes, teacher)
    if not work.setting.config.cache:
        return ready
    return with_cache(ready, work.run_dir / CACHE, work.plan.recipes, teacher)


def show_costs(config: Config) -> None:
    """Prints the cost of a run or of a comparison: nothing is trained or written.

    Args:
        config: config of the run.
    """
    if jax.process_count() > 1:
        got, do = f"{jax.process_count()}", "Leave --dry-run out."
        raise Refusal(message("distill", "a dry run in one process", got, do))
    setting, plan, _ = _checked(config)
    show_forecast(setting, plan.recipes, _count(config, plan))


def show_classes(setting: Setting) -> None:
    """Prints the labels of the classes, if they are other numbers than 0, 1, ..."""
    names = setting.dataset.class_names
    numbers = tuple(map(str, range(len(names))))
    if names != numbers and all(map(str.isdecimal, names)):
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        last = len(names) - 1
        print(f"classes 0..{last} are the labels {some} of {setting.config.dataset}")


def _count(config: Config, plan: Plan) -> int:
    """The number of runs of a plan."""
    return sum(len(arm.rates) for arm in plan.arms) * config.seeds or 1


def _total_steps(work: Work) -> int:
    """The steps of all runs, and of the teacher if it is trained here."""
    config = work.setting.config
    trained_here = teacher_of(config.teacher, config.weights).trained_here
    before = config.teacher_epochs if trained_here else 0
    per_epoch = work.setting.dataset.train.n // config.batch_size
    return (_count(config, work.plan) * config.epochs + before) * per_epoch


def claim(run_dir: Path | None, config: Config) -> Path:
    """Makes the run directory of a new run; it stays empty until the run is checked.

    Raises:
        Refusal: if the directory is not empty, or cannot be made.
    """
    if run_dir is None:
        name = Path(config.dataset).stem
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{name}-{config.method or 'comparison'}-{now}"
        run_dir = inside(Path("runs"), name)
    run_dir = run_dir.expanduser().resolve()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(path.name != LOCK for path in run_dir.iterdir()):
            ours = (run_dir / configs.FILE).exists()
            do = f"Continue with `hintjax resume {run_dir}`." if ours else ""
            do = f"{do} Choose another --run-dir.".strip()
            got = f"{run_dir} with {'a run' if ours else 'other files'} in it"
            raise Refusal(message("distill", "an empty run directory", got, do))
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(f"no right to write in {run_dir}")
    except OSError as error:
        wanted = "a run directory that can be written"
        raise Refusal(message("distill", wanted, f"{error}")) from None
    return run_dir


def _counting(report: Callable[..., None]) -> Begin:
    """Adds up the steps of many runs: begin(name) makes the `show` of the next run."""
    done = {}

    def begin(name: str) -> Callable[..., None]:
        def show(at: int, metrics: Any, phase: str) -> None:
            done[name] = at
            report(sum(done.values()), metrics, f"{name}, {phase}")

        return show

    return begin


def _show(phase: PlannedPhase, places: Places) -> None:
    """Prints the layers that a phase compares, and its note."""
    for who, known, wants in (
        ("student", places.student, phase.method.student),
        ("teacher", places.teacher, phase.method.teacher),
    ):
        shown = [
            f"{path} {known[path].shape[1:]}" if path in known else path
            for path in wants.hints
        ]
        if shown:
            print(f"{phase.name}: {who} {', '.join(shown)}")
    if phase.note:
        print(phase.note)


def resume(run_dir: Path, devices: int | None = None, fsdp: int | None = None) -> None:
    """Continues a run, or a comparison, where it stopped.

    Args:
        run_dir: run directory.
        devices: number of devices, if it differs from before.
        fsdp: number of devices over which large parameters are sharded, if it differs.
    """
    path = run_dir.expanduser().resolve()
    given = {"devices": devices, "fsdp": fsdp}
    changes = {name: number for name, number in given.items() if number is not None}
    config = configs.check(dataclasses.replace(run_config(path), **changes))
    distill(config, path, resume=True)
