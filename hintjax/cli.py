"""The command `hintjax`: distill, resume, eval, layers, methods, doctor."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from hintjax import config as configs
from hintjax import places, recipes
from hintjax._checks import message, nearest
from hintjax.compare import REPORT, Arm, compare, picture, show_table, table
from hintjax.config import Config
from hintjax.experiment import (
    DEPLOYED,
    accuracy,
    check,
    check_teacher,
    layers,
    load_deployed,
    load_student,
    network,
    prepare,
    run,
    run_config,
    teacher_variables,
)
from hintjax.metrics import progress
from hintjax.processes import agree, first, leaving, start, told
from hintjax.recipes import Recipe
from hintjax.rundir import LOCK, inside, owned, write_text

RECIPES: dict[str, Recipe] = {
    "ab": recipes.AB,
    "at": recipes.AT,
    "backprop": recipes.backprop,
    "catkd": recipes.CAT_KD,
    "cc": recipes.CC,
    "cosine": recipes.COSINE,
    "crd": recipes.CRD,
    "crd_in_batch": recipes.CRD_IN_BATCH,
    "crd_shared": recipes.CRD_SHARED,
    "cwd": recipes.CWD,
    "dist": recipes.DIST,
    "dkd": recipes.DKD,
    "fitnet": recipes.FITNETS_JOINTLY,
    "fitnets": recipes.FITNETS,
    "fsp": recipes.FSP,
    "ft": recipes.FT,
    "kd": recipes.KD,
    "mgd": recipes.MGD,
    "minilm": recipes.MINILM,
    "nst": recipes.NST,
    "ofd": recipes.OFD,
    "pkd": recipes.PKD,
    "pkt": recipes.PKT,
    "review": recipes.REVIEW,
    "rkd": recipes.RKD,
    "simkd": recipes.SIMKD,
    "soft": recipes.SOFT,
    "sp": recipes.SP,
    "std_kd": recipes.STANDARDIZED_KD,
    "tinybert": recipes.TINYBERT,
    "vid": recipes.VID,
}

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
        raise ValueError(message("distill", "a method", repr(name), do))
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
        raise ValueError(message("distill", "one method in several processes", got, do))
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
    trained = config.teacher_epochs if ":" in config.teacher else 0
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
            raise ValueError(message("distill", "an empty run directory", got, do))
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(f"no right to write in {run_dir}")
    except OSError as error:
        wanted = "a run directory that can be written"
        raise ValueError(message("distill", wanted, f"{error}")) from None
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


@dataclasses.dataclass(frozen=True)
class Several:
    """One run by several processes; on the hosts of a Cloud TPU, without options."""

    coordinator: str | None = None
    """Where the first process is: host:port; it alone needs the run directory."""
    processes: int | None = None
    """How many processes there are; each is given the same command but for the next."""
    process: int | None = None
    """Which of them this is, from 0."""


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


def show_layers(
    model: str, shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10
) -> None:
    """Lists every layer that can be a hint or guided layer, with its shape.

    Args:
        model: package.module:factory, or the directory of a finished run.
        shape: of one input.
        classes: what the factory is called with.
    """
    if ":" in model:
        found = network(model, classes)
    else:
        found, _ = load_student(model)
    for path, layer in layers(found, jax.numpy.zeros((1, *shape))).items():
        print(f"{path:40} {layer.shape[1:]}  {layer.dtype}")


def show_methods() -> None:
    """Lists every method of `distill --method` as a Markdown table."""
    print(methods_table())


def methods_table() -> str:
    """The table of `hintjax methods`, read off recipes and docstrings."""
    columns = ("name", "method", "transfers", "attaches to", "trains", "weight")
    rows = [(*columns, "reference", "file"), ("---",) * 8]
    for name, recipe in RECIPES.items():
        if recipe is recipes.backprop:
            continue
        method = recipe.method
        text = inspect.getdoc(method)
        summary = re.sub(r" \(see .*|\.$", "", text.splitlines()[0])
        where = inspect.getdoc(recipe.where)
        returned = " ".join(_section(text, "Returns").split())
        trains = re.search(r"trains (.*?)(?:[.;,]| beside)(?: |$)", returned)
        rows.append(
            (
                f"`{name}`",
                f"`{method.__name__}`",
                summary,
                where[0].lower() + where[1:].rstrip("."),
                trains[1] if trains else "nothing",
                _weight(recipe),
                " ".join(_section(text, "References").split()).rstrip("."),
                f"`{method.__module__.replace('.', '/')}.py`",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _section(text, name):
    """What a docstring says under a heading."""
    found = re.search(rf"^{name}:\n((?:(?: .*)?\n?)+)", text, re.MULTILINE)
    return found[1] if found else ""


def _weight(recipe):
    if isinstance(recipe, recipes.BeforeTask):
        return "alone, in a hint stage before the task"
    if isinstance(recipe, recipes.Alone):
        return "alone, without the task"
    number = recipe.weight
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    task = recipe.task_weight
    return f"{shown}, the task {task:g}" if task != 1 else shown


def doctor() -> None:
    """Says what a report of a problem should hold: versions, devices, disk."""
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for name in (
        *("hintjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex"),
        *("tensorflow-datasets", "grain", "tyro", "rich", "matplotlib"),
    ):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:20} {version}")
    for device in jax.devices():
        print(f"device       {device.id}: {device.device_kind} ({device.platform})")
    print(f"XLA_FLAGS    {os.environ.get('XLA_FLAGS', '')}")
    free = shutil.disk_usage(Path.cwd()).free
    writable = "writable" if os.access(Path.cwd(), os.W_OK) else "not writable"
    print(f"disk         {free / 2**30:.1f} GiB free here, {writable}")


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of the command."""
    with leaving():
        _main(argv)


def _main(argv):
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        default, argv = _from_file(argv)
        alone = Several()

        def distill_command(
            config: tyro.conf.OmitArgPrefixes[Config] = default,
            run_dir: Path | None = None,
            several: tyro.conf.OmitArgPrefixes[Several] = alone,
        ) -> None:
            """Distils a teacher into a student; without --method, compares methods.

            --config FILE takes a run's config.yaml for the defaults of all options.

            Args:
                config: what to run.
                run_dir: where all of it goes; by default a new directory in runs/.
                several: processes.
            """
            checked = configs.check(config)
            start(**dataclasses.asdict(several))
            path = Path(told(lambda: str(claim(run_dir, checked))))
            if first():
                print(f"run directory: {path}")
            distill(checked, path)

        def resume_command(
            run_dir: Path,
            devices: int | None = None,
            fsdp: int | None = None,
            several: tyro.conf.OmitArgPrefixes[Several] = alone,
        ) -> None:
            """Goes on with a run, or a comparison, where it stopped.

            Args:
                run_dir: its run directory.
                devices: another number of them than before.
                fsdp: another number of shares than before.
                several: processes.
            """
            start(**dataclasses.asdict(several))
            resume(run_dir, devices, fsdp)

        tyro.extras.subcommand_cli_from_dict(
            {
                "distill": distill_command,
                "resume": resume_command,
                "eval": evaluate_run,
                "layers": show_layers,
                "methods": show_methods,
                "doctor": doctor,
            },
            prog="hintjax",
            args=argv,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except KeyboardInterrupt as stopped:
        print(f"hintjax: stopped. {stopped}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        # What the library says about its input is for the person at the terminal;
        # anything else is a defect, and its traceback is for whoever mends it.
        if not re.match(r"[\w. ]+: expected .+, got ", str(error), re.DOTALL):
            raise
        print(f"hintjax: {error}", file=sys.stderr)
        sys.exit(2)


def _from_file(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Takes --config FILE off the arguments: it gives the defaults of the others."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return configs.load(argv[i + 1]), [*argv[:i], *argv[i + 2 :]]
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
            return configs.load(path), [*argv[:i], *argv[i + 1 :]]
    return Config(), list(argv)


if __name__ == "__main__":
    main()
