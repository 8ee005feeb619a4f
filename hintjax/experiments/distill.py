"""The commands `distill`, `resume` and `eval`."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
from pathlib import Path

import jax

from hintjax._checks import Refusal, message, nearest
from hintjax.experiments import attachment as places
from hintjax.experiments import config as configs
from hintjax.experiments import recipes
from hintjax.experiments.comparison import REPORT, Arm, compare
from hintjax.experiments.comparison_picture import picture
from hintjax.experiments.comparison_table import show_table, table
from hintjax.experiments.config import Config
from hintjax.experiments.finished import DEPLOYED, accuracy, run_config
from hintjax.experiments.methods_table import RECIPES
from hintjax.experiments.phases import check
from hintjax.experiments.run import load_deployed, run
from hintjax.experiments.setting import prepare
from hintjax.experiments.teacher import teacher_of
from hintjax.experiments.teaching import check_teacher, teacher_variables
from hintjax.processes import agree, first
from hintjax.training import progress
from hintjax.training.run_directory import LOCK, inside, owned, write_text

COMPILED = "compiled"  # programs, in the run directory

# What `distill` compares when it is told nothing else. The plain student is the kind
# that FitNets was invented for; the He rows and the untrained teacher say what part of
# a gain is only that the student trains at all.
_HE = "hintjax.models:plain_thin_he"


def _arms(config: Config) -> list[Arm]:
    def arm(name, recipe, rate=1e-3, initial=config.student, **more):
        return Arm(name, recipe, config.rates or (rate,), initial, **more)

    if config.compare:
        rate = config.learning_rate
        return [
            arm(name, _recipe(name), rate, baseline=not _attaches(_recipe(name)))
            for name in config.compare
        ]
    hints = {"recipe": recipes.FITNETS, "baseline": False}
    maps = recipes.AT._replace(where=places.middle)  # of the pair that FitNets takes
    arms = [
        arm("backprop", recipes.backprop),
        arm("KD", recipes.SOFT),
        arm("AT", maps),
        arm("FitNets", **hints),
        arm("FitNets, untrained hints", **hints, untrained=True),
        arm("hints, then the task", recipes.HINTS_THEN_TASK, baseline=False),
    ]
    if config.student == Config.student:
        arms += [
            arm("backprop, He", recipes.backprop, initial=_HE),
            arm("KD, He", recipes.SOFT, initial=_HE),
            arm("AT, He", maps, 3e-3, _HE),
            arm("FitNets, He", **hints, initial=_HE),
        ]
    return arms


def _attaches(recipe):
    """Whether a recipe compares more than outputs."""
    return recipe is not recipes.backprop and recipe.where is not places.outputs


def _recipe(name):
    if name not in RECIPES:
        do = f"Nearest: {', '.join(nearest(name, RECIPES))}."
        raise Refusal(message("distill", "a method", repr(name), do))
    return RECIPES[name]


def distill(config: Config, run_dir: Path, *, resume: bool = False) -> None:
    """Runs what a config says, in a run directory that it owns.

    Args:
        config: one method, or a comparison of methods.
        run_dir: checked and made by `claim`.
        resume: go on where it stopped.
    """
    arms = _arms(config) if config.method is None else []
    used = [arm.recipe for arm in arms] or [_recipe(config.method)]
    if arms and jax.process_count() > 1:
        do = "Give it --method, or compare in one process."
        got = f"a comparison in {jax.process_count()}"
        raise Refusal(message("distill", "one method in several processes", got, do))
    agree("config", _said(config))
    with owned(run_dir), contextlib.ExitStack() as silence:
        if not first():
            nowhere = silence.enter_context(Path(os.devnull).open("w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        keep_compiled(run_dir / COMPILED)
        _distill(config, run_dir, arms, used, resume)


def _said(config):
    """What processes of one run have to agree on; data may lie in other places."""
    versions = {name: importlib.metadata.version(name) for name in ("hintjax", "jax")}
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name != "data_dir"} | versions


def keep_compiled(folder: Path) -> None:
    """What is compiled is kept for a run that goes on, unless JAX was told where.

    All of it: what compiles in less than a second is hundreds of programs together.
    """
    there = first() or folder.parent.exists()
    if there and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _distill(config, run_dir, arms, used, resume):
    setting = prepare(config, teach=config.method != "backprop")
    steps = {step.name: step for recipe in used for step in check(setting, recipe)}
    if not resume:
        configs.save(config, run_dir)
    for step in steps.values():
        _show(step, setting.places)
    per_epoch = setting.dataset.train.n // config.batch_size
    runs = sum(len(arm.rates) for arm in arms) * config.seeds or 1
    trained = 0 if teacher_of(config.teacher).factory is None else config.teacher_epochs
    total = (runs * config.epochs + trained) * per_epoch
    with progress(total, "hintjax", images_per_step=config.batch_size) as report:
        begin, variables = _counting(report), None
        if setting.teacher is not None:
            variables = teacher_variables(config, run_dir, show=begin("teacher"))
            check_teacher(setting, variables)
        if not arms:
            (recipe,) = used
            how = {"teacher": variables, "resume": resume, "show": begin("student")}
            fitted, _ = run(setting, run_dir, recipe, **how)
            print(fitted.account())
            return
        found = compare(setting, run_dir, arms, variables, begin=begin)
    baselines = [arm.name for arm in arms if arm.baseline] or [arms[0].name]
    result = table(setting, variables, found, baselines)
    write_text(run_dir / REPORT, json.dumps(result, indent=1))
    show_table(result)
    print(f"picture: {picture(setting, run_dir, variables, result, found)}")


def claim(run_dir: Path | None, config: Config) -> Path:
    """Makes the run directory of a new run; it stays empty until all is checked.

    Raises:
        ValueError: if it holds anything, or cannot be made.
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
            do = f"Go on with `hintjax resume {run_dir}`." if ours else ""
            do = f"{do} Choose another --run-dir.".strip()
            got = f"{run_dir} with {'a run' if ours else 'other files'} in it"
            raise Refusal(message("distill", "an empty run directory", got, do))
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(f"no right to write in {run_dir}")
    except OSError as error:
        wanted = "a run directory that can be written"
        raise Refusal(message("distill", wanted, f"{error}")) from None
    return run_dir


def _counting(report):
    """Steps of many runs as those of one: begin(name) gives the next run's `show`."""
    done = {}

    def begin(name):
        def show(at, metrics, phase):
            done[name] = at
            report(sum(done.values()), metrics, f"{name}, {phase}")

        return show

    return begin


def _show(step, seen):
    """What a phase compares, and what it needs."""
    for who, known, wants in (
        ("student", seen.student, step.method.student),
        ("teacher", seen.teacher, step.method.teacher),
    ):
        shown = [
            f"{path} {known[path].shape[1:]}" if path in known else path
            for path in wants.hints
        ]
        if shown:
            print(f"{step.name}: {who} {', '.join(shown)}")
    if step.note:
        print(step.note)


def resume(run_dir: Path, devices: int | None = None, fsdp: int | None = None) -> None:
    """Goes on with a run, or a comparison, where it stopped.

    Args:
        run_dir: its run directory.
        devices: another number of them than before.
        fsdp: another number of shares than before.
    """
    path = run_dir.expanduser().resolve()
    given = {"devices": devices, "fsdp": fsdp}
    changes = {name: number for name, number in given.items() if number is not None}
    config = configs.check(dataclasses.replace(run_config(path), **changes))
    distill(config, path, resume=True)


def evaluate_run(run_dir: Path) -> None:
    """Says how accurate the student of a finished run is, or shows a comparison.

    Args:
        run_dir: its run directory.
    """
    path = run_dir.expanduser().resolve()
    if (path / REPORT).exists():
        show_table(json.loads((path / REPORT).read_text()))
        return
    config = configs.load(path)
    recipe = _recipe(config.method)
    here = dataclasses.replace(config, devices=1, fsdp=1)  # whatever it was trained on
    setting = prepare(here, teach=(path / DEPLOYED).exists())
    student, variables = load_deployed(setting, path, recipe)
    dataset = setting.dataset
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        found = accuracy(student, variables, split, dataset.standardize)
        print(f"{name} accuracy: {found:.4f}")
