"""The commands of `hintjax`, and their options."""

import dataclasses
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax

from hintjax._checks import Refusal, message
from hintjax.experiments import config as configs
from hintjax.experiments import listing
from hintjax.experiments.config import (
    Config,
    DataOptions,
    HardwareOptions,
    MethodOptions,
    NetworkOptions,
    OutputOptions,
    ScheduleOptions,
    joined,
    part,
)
from hintjax.experiments.distill import claim, distill, resume, show_costs
from hintjax.experiments.evaluating import evaluate_run, verify_cache
from hintjax.experiments.exporting import export_run
from hintjax.experiments.factories import layers, network
from hintjax.experiments.finished import load_student
from hintjax.experiments.measuring import measure_run
from hintjax.experiments.probing import probe
from hintjax.experiments.report.report import write_comparison, write_report
from hintjax.experiments.suggestion import suggest
from hintjax.experiments.tuning.halving import TUNING
from hintjax.experiments.tuning.tune import retune, tune
from hintjax.processes import first, told


def commands(default: Config) -> dict[str, Callable[..., None]]:
    """The commands by their names.

    Args:
        default: config with the defaults of the options of `distill` and `tune`.
    """
    found: dict[str, Callable[..., None]] = {
        "distill": _distill_command(default),
        "tune": _tune_command(default),
        "resume": _resume_command(),
        "eval": evaluate_run,
        "probe": probe,
        "layers": show_layers,
        "suggest": _suggest_command(),
        "methods": show_methods,
        "report": report_command,
        "cache": cache_command,
        "export": export_command,
        "measure": _measure_command(),
        "doctor": doctor,
    }
    for command in found.values():
        command.__doc__ = _for_help(command.__doc__ or "")
    return found


def _for_help(doc: str) -> str:
    """A docstring whose arguments have texts of one line, with a capital letter.

    tyro prints these texts as they stand.
    """
    lines = re.sub(r"\n {8}", " ", inspect.cleandoc(doc))
    capital = r"(?m)^( {4}\w+: )(\w)"
    return re.sub(capital, lambda found: found[1] + found[2].upper(), lines)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes for one run; on a Cloud TPU they are found without options.

    Attributes:
        coordinator: Address of the first process as host:port, the same in all
            processes. Only the first process needs the run directory.
        processes: Number of processes. Each is started with the same options, except
            --process.
        process: Number of this process, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


ALONE = Processes()


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of a run, by subject.

    Attributes:
        method: How the student learns from the teacher.
        data: The images and labels.
        networks: The teacher and the student.
        schedule: How long the student is trained, and with which steps.
        output: How often a run is evaluated and saved.
        hardware: The devices, and what they do at once.
    """

    method: MethodOptions
    data: DataOptions
    networks: NetworkOptions
    schedule: ScheduleOptions
    output: OutputOptions
    hardware: HardwareOptions

    def config(self) -> Config:
        """The config with these options."""
        return joined(*vars(self).values())


def options_of(config: Config) -> Options:
    """The options of a config, by subject; the inverse of `Options.config`."""
    subjects = typing.get_type_hints(Options)
    return Options(**{name: part(config, kind) for name, kind in subjects.items()})


def show_layers(
    model: str, shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10
) -> None:
    """Lists every layer that can be a hint or guided layer, with its shape.

    Args:
        model: factory as package.module:factory, or directory of a finished run.
        shape: height, width and channels of one input.
        classes: number of classes with which the factory is called.
    """
    if ":" in model:
        found = network(model, classes)
    else:
        found, _ = load_student(model)
    for path, layer in layers(found, jax.numpy.zeros((1, *shape))).items():
        print(f"{path:40} {layer.shape[1:]}  {layer.dtype}")


def show_methods(*, markdown: bool = False) -> None:
    """Lists every method of `distill --method`.

    Args:
        markdown: whether to print Markdown, which also has the papers and files.
    """
    listing.show(in_markdown=markdown)


def report_command(run_dirs: tuple[Path, ...], output: Path | None = None) -> None:
    """Writes report.html of a run or a comparison again, or compares finished runs.

    It reads only the files of the run directories.

    Args:
        run_dirs: One run directory, whose report is written again. Or several run
            directories of runs on one dataset, which are compared.
        output: File of the report that compares runs. By default report.html in the
            current directory.
    """
    paths = [path.expanduser().resolve() for path in run_dirs]
    if len(paths) == 1 and output is None:
        print(f"report: {write_report(paths[0])}")
        return
    file = (output or Path("report.html")).expanduser().resolve()
    print(f"report: {write_comparison(paths, file)}")


def cache_command(action: Literal["verify"], run_dir: Path) -> None:
    """Checks a run's cache of teacher features: some rows are computed again.

    Prints the largest error and the least cosine of each feature.

    Args:
        action: the only action is verify.
        run_dir: run directory, whose run was started with --cache.
    """
    verify_cache(run_dir)


def export_command(
    run_dir: Path,
    to: Literal["stablehlo", "onnx", "tflite", "tflite-int8", "c-array"] = "stablehlo",
    batch: int | Literal["symbolic"] | None = None,
    output: Path | None = None,
    representative: int = 256,
) -> None:
    """Exports the student of a finished run, alone, in a file for a device.

    The file takes pixels (uint8, 0..255) and gives logits; the standardization of the
    images is inside. The file is run on the test split and compared with the student.

    Args:
        run_dir: run directory. Of a comparison, the run that is best on the validation
            split is exported.
        to: format of the file. stablehlo is read by jax.export. tflite-int8 computes in
            int8: its input is uint8, its output int8. c-array is the same network as C,
            for a microcontroller.
        batch: number of images in a batch, or symbolic for any number. The default is
            symbolic for stablehlo and onnx, and 1 for the others.
        output: file that is written; by default a file in RUN_DIR/exported.
        representative: number of training images that set the ranges of int8.
    """
    export_run(run_dir, to, batch, output, representative)


def doctor() -> None:
    """Prints versions, devices and disk space, for the report of a problem."""
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


def _distill_command(default: Config) -> Callable[..., None]:
    """The command `distill`, whose options are those of a config, by subject."""
    from tyro.conf import OmitArgPrefixes as Flat
    from tyro.conf import arg

    defaults = options_of(default)

    def distill_command(
        run_dir: Path | None = None,
        options: Annotated[Flat[Options], arg(name="")] = defaults,
        processes: Flat[Processes] = ALONE,
        dry_run: bool = False,
    ) -> None:
        """Distills a teacher into a student; without --method, compares methods.

        --config FILE reads the defaults of all options from a run's config.yaml.

        Args:
            run_dir: Run directory, which holds all results. By default a new directory
                in runs/.
            options: All options of a run.
            processes: Several processes for one run. On a Cloud TPU they are found
                without options.
            dry_run: Whether to print the cost of the run (operations, memory, time,
                disk) and to end, without training or writing.
        """
        config = configs.check(options.config())
        if dry_run:
            show_costs(config)
            return
        path = Path(told(lambda: str(claim(run_dir, config))))
        if first():
            print(f"run directory: {path}")
        distill(config, path)

    return distill_command


def _tune_command(default: Config) -> Callable[..., None]:
    """The command `tune`, which takes the options of `distill`."""
    from tyro.conf import OmitArgPrefixes as Flat
    from tyro.conf import Positional, arg

    defaults = options_of(default)

    def tune_command(
        config: Positional[Path | None] = None,
        over: tuple[str, ...] = (),
        candidates: int = 16,
        rungs: int | None = None,
        run_dir: Path | None = None,
        options: Annotated[Flat[Options], arg(name="")] = defaults,
    ) -> None:
        """Finds good settings of a method, or of each method of a comparison.

        Trains many students of one teacher, on one device: the better half of them
        trains on, several times (successive halving). The validation split chooses; the
        test split is not read. Prints a table and the command for the best settings.
        `hintjax resume RUN_DIR` continues a tuning that was stopped. Of the hardware
        options only --accumulate is used.

        Args:
            config: Config file or run directory with the defaults of all options; it
                must be the first argument.
            over: Settings and their values, as weight=1..1000 (random draws) or
                temperature=2,4 (these values). Names: weight, learning_rate,
                temperature, pairs, task_weight, kd_weight, hinted_rate, hint_epochs,
                negatives. Several pairs in one value are joined by +.
            candidates: Number of random draws, if there is a range. Listed values alone
                are tried in all combinations.
            rungs: Largest number of parts of the training; after each part but the last
                half of the students stop. With 1 all train to the end. By default as
                many as the numbers of students and epochs allow.
            run_dir: Run directory, which holds all results. By default a new directory
                in runs/.
            options: All options of a run.
        """
        if config is not None:
            do = "Write `hintjax tune CONFIG --over ...`."
            wanted = "the config file as the first argument"
            raise Refusal(message("tune", wanted, f"{config}", do))
        used = configs.check(options.config())
        path = claim(run_dir, used)
        print(f"run directory: {path}")
        tune(used, path, over, candidates, rungs)

    return tune_command


def _suggest_command() -> Callable[..., None]:
    """The command `suggest`, which takes the data and networks of `distill`."""
    from tyro.conf import OmitArgPrefixes as Flat
    from tyro.conf import Positional

    default_data, default_networks = DataOptions(), NetworkOptions()

    def suggest_command(
        run_dir: Positional[Path | None] = None,
        count: int = 1,
        images: int = 512,
        picture: Path = Path("suggest.png"),
        data: Flat[DataOptions] = default_data,
        networks: Flat[NetworkOptions] = default_networks,
    ) -> None:
        """Measures which layers of a teacher are good hints; trains nothing.

        Runs the teacher and an untrained student over some training images. Prints a
        table of the teacher's layers and the suggested pairs, and draws the similarity
        (CKA) of each layer of the teacher with each layer of the student. In a
        benchmark the pair could not be told apart from the usual pair of the middle.

        Args:
            run_dir: Run directory, whose data and networks are used instead of the data
                and network options. By default the options are used.
            count: Number of pairs to suggest, at most.
            images: Number of training images, half to fit and half to judge.
            picture: File for the picture (.png).
            data: The images, and labels if there are any.
            networks: The teacher and the student.
        """
        options = joined(data, networks)
        config = configs.check(options) if run_dir is None else configs.load(run_dir)
        suggest(config, run_dir, count=count, images=images, picture=picture)

    return suggest_command


def _measure_command() -> Callable[..., None]:
    """The command `measure`."""
    from tyro.conf import Positional

    def measure_command(
        run_dir: Path, files: Positional[tuple[Path, ...]] = (), repeats: int = 200
    ) -> None:
        """Measures exported files on the test split, each in the program of its format.

        Prints the metric, the agreement with the student in JAX, the size, the latency
        of one image on one thread, and the memory in TFLite Micro. Writes the same
        numbers in RUN_DIR/measured.json.

        Args:
            run_dir: run directory. Of a comparison, the run that is best on the
                validation split is the student.
            files: exported files; by default all files in RUN_DIR/exported, largest
                first. Ratios are to the first file.
            repeats: number of times that each file is timed.
        """
        measure_run(run_dir, files, repeats)

    return measure_command


def _resume_command() -> Callable[..., None]:
    """The command `resume`."""
    from tyro.conf import OmitArgPrefixes as Flat

    def resume_command(
        run_dir: Path,
        devices: int | None = None,
        fsdp: int | None = None,
        processes: Flat[Processes] = ALONE,
    ) -> None:
        """Continues a run, a comparison or a tuning where it stopped.

        Args:
            run_dir: Run directory of the run.
            devices: Number of devices, if it differs from before.
            fsdp: Number of devices over which large parameters are sharded, if it
                differs from before.
            processes: Several processes for one run. On a Cloud TPU they are found
                without options.
        """
        if (run_dir.expanduser() / TUNING).exists():
            retune(run_dir)
        else:
            resume(run_dir, devices, fsdp)

    return resume_command
