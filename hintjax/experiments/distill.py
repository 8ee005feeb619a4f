"""The commands `distill`, `resume`, `eval` and `cache`: the runs of a run directory."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hintjax._checks import Refusal, message, nearest
from hintjax.experiments import attachment, recipes
from hintjax.experiments import config as configs
from hintjax.experiments.attachment import Places
from hintjax.experiments.caching import (
    CACHE,
    contents_of,
    methods_of,
    verify,
    with_cache,
)
from hintjax.experiments.comparison import REPORT, Arm, compare
from hintjax.experiments.comparison_picture import picture
from hintjax.experiments.comparison_table import max_validated, show_table, table
from hintjax.experiments.config import Config
from hintjax.experiments.doubts import doubts_after, doubts_before
from hintjax.experiments.finished import (
    DEPLOYED,
    RESULT,
    evaluation_size,
    run_config,
    score,
)
from hintjax.experiments.forecast import check_memory, show_forecast
from hintjax.experiments.launch.ending import training_begins
from hintjax.experiments.methods_table import CLASSES_ONLY, RECIPES
from hintjax.experiments.phases import check, check_balance
from hintjax.experiments.pretrained import recorded
from hintjax.experiments.recipes import PlannedPhase, Recipe, With, backprop
from hintjax.experiments.report.drawn import drawing
from hintjax.experiments.report.end_of_run import arm_facts, report_run, written
from hintjax.experiments.report.facts import Pair, pair_of
from hintjax.experiments.run import load_deployed, run
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.standardizing import with_standardizations
from hintjax.experiments.teacher import teacher_of
from hintjax.experiments.teaching import check_teacher, teacher_variables
from hintjax.networks import Network, Variables
from hintjax.processes import agree, first
from hintjax.training import progress
from hintjax.training.remarks import remark
from hintjax.training.run_directory import LOCK, inside, owned, read_json, write_text

COMPILED = "compiled"  # programs, in the run directory

# `distill` compares these arms by default. FitNets was invented for students such as
# the plain one. The He rows and the untrained teacher show how much of a gain comes
# only from a student that trains at all.
_HE = "hintjax.models:plain_thin_he"


class Plan(NamedTuple):
    """The runs that a config asks for.

    Attributes:
        recipes: recipes of these runs.
        arms: arms of a comparison; none for a single run.
    """

    recipes: Sequence[Recipe]
    arms: Sequence[Arm] = ()


def planned(config: Config) -> Plan:
    """The recipes of the methods that a config names, alone or as a comparison."""
    if config.method is not None:
        return Plan([recipe_of(config.method, config.task)])
    arms = _named_arms(config) if config.compare else _default_arms(config)
    return Plan([arm.recipe for arm in arms], arms)


def recipe_of(name: str, task: str) -> Recipe:
    """The recipe of a method's name, for a task."""
    if name not in RECIPES:
        do = f"Nearest: {', '.join(nearest(name, RECIPES))}."
        raise Refusal(message("distill", "a method", repr(name), do))
    if name in CLASSES_ONLY and task != Config.task:
        do = f"{name} needs class labels, or the softmax of a classifier."
        raise Refusal(message("distill", f"a method for {task}", repr(name), do))
    return RECIPES[name]


def _named_arms(config: Config) -> list[Arm]:
    """The arms of --compare; methods that compare only outputs are baselines."""
    rates = config.rates or (config.learning_rate,)
    arms, settings = [], configs.own_settings(config)
    for name in config.compare:
        recipe = recipe_of(name, config.task)
        own = settings.get(name, {})
        tried = (own.pop("learning_rate"),) if "learning_rate" in own else rates
        used = With(recipe, tuple(own.items())) if own else recipe
        arms.append(
            Arm(name, used, tried, config.student, baseline=not attaches(recipe))
        )
    return arms


def attaches(recipe: Recipe) -> bool:
    """Whether a recipe attaches to hidden layers, or compares only outputs."""
    return recipe is not backprop and recipe.where is not attachment.outputs


def _default_arms(config: Config) -> list[Arm]:
    """FitNets, its controls, KD and AT, at rates that were chosen on the digits."""

    def arm(
        name: str,
        recipe: Recipe,
        rate: float = 1e-3,
        initial: str = config.student,
        **more: bool,
    ) -> Arm:
        return Arm(name, recipe, config.rates or (rate,), initial, **more)

    hints = {"recipe": recipes.FITNETS, "baseline": False}
    maps = recipes.AT._replace(where=attachment.middle)  # the pair of FitNets
    arms = [
        arm("backprop", backprop),
        arm("KD", recipes.SOFT),
        arm("AT", maps),
        arm("FitNets", **hints),
        arm("FitNets, untrained hints", **hints, untrained=True),
        arm("hints, then the task", recipes.HINTS_THEN_TASK, baseline=False),
    ]
    if config.student == Config.student:
        arms += [
            arm("backprop, He", backprop, initial=_HE),
            arm("KD, He", recipes.SOFT, initial=_HE),
            arm("AT, He", maps, 3e-3, _HE),
            arm("FitNets, He", **hints, initial=_HE),
        ]
    return arms


def distill(config: Config, run_dir: Path, *, resume: bool = False) -> None:
    """Runs one method, or a comparison of methods, in a run directory.

    Args:
        config: config of the run.
        run_dir: run directory, made by `claim`.
        resume: whether to continue a run that stopped.
    """
    plan = planned(config)
    agree("config", _shared(config))
    with owned(run_dir), contextlib.ExitStack() as silence:
        if not first():
            nowhere = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        keep_compiled(run_dir / COMPILED)
        _distill(config, run_dir, plan, resume)


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


def _check_comparison(setting: Setting, plan: Plan) -> None:
    """Raises for a comparison without labels: a metric of labels compares the arms."""
    if plan.arms and not setting.dataset.labeled:
        wanted = f"labels in {setting.config.dataset}, to compare methods"
        do = "Name one method, e.g. --method dense_matching."
        raise Refusal(message("distill", wanted, "none", do))


def _distill(config: Config, run_dir: Path, plan: Plan, resume: bool) -> None:
    """Checks and runs a plan in a run directory that is owned."""
    config = recorded(config)
    setting = prepare(config, teach=config.method != "backprop")
    show_classes(setting)
    _check_comparison(setting, plan)
    phases = [phase for recipe in plan.recipes for phase in check(setting, recipe)]
    check_balance(config, phases)
    if not resume:
        configs.save(config, run_dir)
    for phase in {phase.name: phase for phase in phases}.values():
        _show(phase, setting.places)
    if not resume:
        check_memory(setting, plan.recipes)
    total = _total_steps(setting, plan)
    with progress(total, "hintjax", images_per_step=config.batch_size) as report:
        begin = _counting(report)
        training_begins()

        def taught() -> tuple[Variables, float | None]:
            variables = teacher_variables(setting, run_dir, show=begin("teacher"))
            return variables, check_teacher(setting, variables)

        def doubted(teacher: Variables | None) -> Pair | None:
            hints = any(phase.method.student.hints for phase in phases)
            pair = None if resume or not hints else pair_of(setting, teacher)
            remark(run_dir, doubts_before(setting, phases, pair))
            return pair

        def cached(variables: Variables) -> Setting:
            ready = with_standardizations(setting, plan.recipes, variables)
            if not config.cache:
                return ready
            return with_cache(ready, run_dir / CACHE, plan.recipes, variables)

        if not plan.arms:
            (recipe,) = plan.recipes
            teacher, known = (None, None) if setting.teacher is None else taught()
            pair = doubted(teacher)
            how = {"teacher": teacher, "resume": resume, "show": begin("student")}
            runs = setting if teacher is None else cached(teacher)
            fitted, result = run(runs, run_dir, recipe, **how)
            print(fitted.account())
            metric = f"validation/{setting.task.name}"
            own = {phases[-1].name: result[metric]} if metric in result else {}
            remark(run_dir, doubts_after(setting, known, own))
            report_run(setting, run_dir, recipe, teacher, pair)
            return
        variables, known = taught()
        doubted(variables)
        runs = cached(variables)
        found = compare(runs, run_dir, plan.arms, variables, begin=begin)
    arms = plan.arms
    baselines = [arm.name for arm in arms if arm.baseline] or [arms[0].name]
    result = table(setting, variables, found, baselines)
    write_text(run_dir / REPORT, json.dumps(result, indent=1))
    show_table(result)
    if drawing():
        print(f"picture: {picture(setting, run_dir, variables, result, found)}")
    arm_facts(setting, run_dir, arms, variables, found)
    own = {name: max_validated(setting.task, arm) for name, arm in found.items()}
    remark(run_dir, doubts_after(setting, known, own))
    print(f"report: {written(run_dir)}")


def show_costs(config: Config) -> None:
    """Prints the cost of a run or of a comparison: nothing is trained or written.

    Args:
        config: config of the run.
    """
    plan = planned(config)
    if jax.process_count() > 1:
        got, do = f"{jax.process_count()}", "Leave --dry-run out."
        raise Refusal(message("distill", "a dry run in one process", got, do))
    setting = prepare(config, teach=config.method != "backprop")
    _check_comparison(setting, plan)
    phases = [phase for recipe in plan.recipes for phase in check(setting, recipe)]
    check_balance(config, phases)
    for phase in {phase.name: phase for phase in phases}.values():
        _show(phase, setting.places)
    runs = sum(len(arm.rates) for arm in plan.arms) * config.seeds or 1
    show_forecast(setting, plan.recipes, runs)


def show_classes(setting: Setting) -> None:
    """Prints the labels of the classes, if they are other numbers than 0, 1, ..."""
    names = setting.dataset.class_names
    numbers = tuple(map(str, range(len(names))))
    if names != numbers and all(map(str.isdecimal, names)):
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        last = len(names) - 1
        print(f"classes 0..{last} are the labels {some} of {setting.config.dataset}")


def _total_steps(setting: Setting, plan: Plan) -> int:
    """The steps of all runs, and of the teacher if it is trained here."""
    config = setting.config
    runs = sum(len(arm.rates) for arm in plan.arms) * config.seeds or 1
    trained_here = teacher_of(config.teacher, config.weights).trained_here
    before = config.teacher_epochs if trained_here else 0
    per_epoch = setting.dataset.train.n // config.batch_size
    return (runs * config.epochs + before) * per_epoch


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


def _counting(report: Callable[..., None]) -> Callable[[str], Callable[..., None]]:
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


def evaluate_run(run_dir: Path) -> None:
    """Prints the metric of a finished run's student, or the table of a comparison.

    Of a run without labels, it prints the losses and R^2 that were measured at its end.

    Args:
        run_dir: run directory.
    """
    path = run_dir.expanduser().resolve()
    if (path / REPORT).exists():
        show_table(json.loads((path / REPORT).read_text()))
        return
    result = read_json(path / RESULT) or {}
    if result.get("class_names") == []:
        _show_losses(result)
        return
    setting, student, variables = shipped(path)
    dataset = setting.dataset
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        size = evaluation_size(split, setting.config)
        where = (split, dataset.standardize, size, setting.task)
        found = score(student, variables, *where)
        print(f"{name} {setting.task.name}: {found:.4f}")


def _show_losses(result: Mapping[str, Any]) -> None:
    """Prints the losses and R^2 of a run without labels, measured at its end."""
    for name, value in result.items():
        of, slash, metric = name.partition("/")
        if slash and not metric.endswith("/weighted"):
            print(f"{of} {metric}: {value:.4g}")


def shipped(
    run_dir: Path, *, rounding: bool = True
) -> tuple[Setting, Network, Variables]:
    """The network that a finished run deploys, on one device.

    Args:
        run_dir: run directory.
        rounding: whether a student that was trained with --quantize rounds. A file has
            its parameters, and rounds them itself.

    Returns:
        The setting of the run, the network and its variables.

    Raises:
        Refusal: if it is not the directory of a finished run of one method.
    """
    config = configs.load(run_dir)
    if config.method is not None:
        recipe = recipe_of(config.method, config.task)
    else:
        recipe = _recipe_of_arm(config, run_dir)
    # Any machine can evaluate.
    quantize = config.quantize and rounding
    here = dataclasses.replace(config, devices=1, fsdp=1, quantize=quantize)
    setting = prepare(here, teach=(run_dir / DEPLOYED).exists())
    return setting, *load_deployed(setting, run_dir, recipe)


def _recipe_of_arm(config: Config, run_dir: Path) -> Recipe:
    """The recipe of a run in a comparison, whose directory is named after its arm."""
    arms = {arm.name: arm.recipe for arm in planned(config).arms}
    if (run_dir / RESULT).exists() and run_dir.parent.name in arms:
        return arms[run_dir.parent.name]
    wanted, do = "a finished comparison", f"Finish it with `hintjax resume {run_dir}`."
    if (run_dir / REPORT).exists():
        wanted, do = "a run of one method", "Name a directory in it that has a run."
    raise Refusal(message("evaluate", wanted, f"{run_dir}", do))


def verify_cache(run_dir: Path) -> None:
    """Checks a run's cache of teacher features: some rows are computed again.

    Prints the largest error and the least cosine of each feature.

    Args:
        run_dir: run directory.
    """
    path = run_dir.expanduser().resolve()
    config = run_config(path)
    here = dataclasses.replace(config, devices=1, fsdp=1)  # any machine can check
    setting = prepare(here, teach=True)
    teacher = teacher_variables(setting, path)
    methods = methods_of(setting, planned(config).recipes)
    verify(path / CACHE, setting, contents_of(setting, methods, teacher), teacher)
