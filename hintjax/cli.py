"""The command `hintjax`: distill, tune, suggest, resume, eval, layers, and others.

The others are methods, probe, report, export, measure, cache and doctor. Its exit
codes: 0 after success; 2 if it refuses the input; 3 if a run learned nothing (its
updates were skipped, because numbers were not finite); 130 after Ctrl-C and 143 after
SIGTERM, both once the run is saved; 141 if the reader of its output ended first
(`hintjax methods | head`); 1 after a defect, with a traceback.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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
    part,
)
from hintjax.experiments.devices import split_cpu
from hintjax.experiments.distill import (
    claim,
    distill,
    evaluate_run,
    resume,
    show_costs,
    verify_cache,
)
from hintjax.experiments.exporting import elsewhere, export_run
from hintjax.experiments.factories import layers, network
from hintjax.experiments.finished import load_student
from hintjax.experiments.launch.ending import watch
from hintjax.experiments.launch.process import leaving, start
from hintjax.experiments.measuring import measure_run
from hintjax.experiments.probing import probe
from hintjax.experiments.report.report import write_comparison, write_report
from hintjax.experiments.suggestion import suggest
from hintjax.experiments.tuning.halving import TUNING
from hintjax.experiments.tuning.tune import retune, tune
from hintjax.export import NoConverter
from hintjax.processes import first, told
from hintjax.training import NothingLearned


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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: arguments of the command; by default the arguments of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with leaving(), _piped():
        try:
            _run(argv)
        except KeyboardInterrupt as stopped:
            print(f"hintjax: stopped. {stopped}".rstrip(), file=sys.stderr)
            raise SystemExit(130) from stopped
        except NoConverter as error:
            code = elsewhere(argv, error)
            if code is None:
                print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(2 if code is None else code) from error
        except Refusal as error:
            # Every other error is a defect, whose traceback helps to mend it.
            print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except NothingLearned as error:
            print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(3) from error


@contextlib.contextmanager
def _piped() -> Iterator[None]:
    """Ends the command without a traceback if the reader of its output ended first."""
    output, code = 1, 128 + signal.SIGPIPE  # the file descriptor; the exit code
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        reader = select.poll()
        reader.register(output, 0)
        if not any(event & select.POLLERR for _, event in reader.poll(0)):
            raise  # another pipe: a defect
        # Python flushes the output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        raise SystemExit(code) from error
    except SystemExit as ended:
        # rich has seen that the reader ended.
        if isinstance(ended.__context__, BrokenPipeError):
            raise SystemExit(code) from ended
        raise


def _run(argv: list[str]) -> None:
    """Reads the arguments, and runs the command that they name."""
    import tyro

    _join(argv)
    default, argv = _from_file(argv)
    tyro.extras.subcommand_cli_from_dict(
        {
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
        },
        prog="hintjax",
        args=argv,
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def _join(argv: Sequence[str]) -> None:
    """Joins the other processes, before anything can fail in this process alone.

    A single process makes the cores of a CPU its devices.
    """
    if argv[:1] not in (["distill"], ["resume"]) or {"-h", "--help"} & {*argv}:
        return
    given: dict[str, Any] = {}
    words = [word for argument in argv[1:] for word in argument.split("=", 1)]
    for name, after in itertools.pairwise(words):
        if name in ("--coordinator", "--processes", "--process"):
            given[name.removeprefix("--")] = after
    for name in ("processes", "process"):
        if name in given:
            try:
                given[name] = int(given[name])
            except ValueError:
                return  # the options are read again, and then refused
    if not given:
        split_cpu()
    start(**given)
    watch()


def _distill_command(default: Config) -> Callable[..., None]:
    """The command `distill`, whose options are those of a config, by subject."""
    from tyro.conf import OmitArgPrefixes as Flat

    default_method = part(default, MethodOptions)
    default_data = part(default, DataOptions)
    default_networks = part(default, NetworkOptions)
    default_schedule = part(default, ScheduleOptions)
    default_output = part(default, OutputOptions)
    default_hardware = part(default, HardwareOptions)

    def distill_command(
        run_dir: Path | None = None,
        method: Flat[MethodOptions] = default_method,
        data: Flat[DataOptions] = default_data,
        networks: Flat[NetworkOptions] = default_networks,
        schedule: Flat[ScheduleOptions] = default_schedule,
        output: Flat[OutputOptions] = default_output,
        hardware: Flat[HardwareOptions] = default_hardware,
        processes: Flat[Processes] = ALONE,
        dry_run: bool = False,
    ) -> None:
        """Distills a teacher into a student; without --method, compares methods.

        --config FILE reads the defaults of all options from a run's config.yaml.

        Args:
            run_dir: Run directory, which holds all results. By default a new directory
                in runs/.
            method: How the student learns from the teacher.
            data: The images and labels.
            networks: The teacher and the student.
            schedule: How long the student is trained, and with which steps.
            output: How often a run is evaluated and saved.
            hardware: The devices, and what they do at once.
            processes: Several processes for one run. On a Cloud TPU they are found
                without options.
            dry_run: Whether to print the cost of the run (operations, memory, time,
                disk) and to end, without training or writing.
        """
        config = configs.check(
            configs.joined(method, data, networks, schedule, output, hardware)
        )
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
    from tyro.conf import Positional

    default_method = part(default, MethodOptions)
    default_data = part(default, DataOptions)
    default_networks = part(default, NetworkOptions)
    default_schedule = part(default, ScheduleOptions)
    default_output = part(default, OutputOptions)
    default_hardware = part(default, HardwareOptions)

    def tune_command(
        config: Positional[Path | None] = None,
        over: tuple[str, ...] = (),
        candidates: int = 16,
        rungs: int | None = None,
        run_dir: Path | None = None,
        method: Flat[MethodOptions] = default_method,
        data: Flat[DataOptions] = default_data,
        networks: Flat[NetworkOptions] = default_networks,
        schedule: Flat[ScheduleOptions] = default_schedule,
        output: Flat[OutputOptions] = default_output,
        hardware: Flat[HardwareOptions] = default_hardware,
    ) -> None:
        """Finds good settings of a method, or of each method of a comparison.

        Trains many students of one teacher, on one device: the better half of them
        trains on, several times (successive halving). The validation split chooses; the
        test split is not read. Prints a table and the command for the best settings.
        `hintjax resume RUN_DIR` continues a tuning that was stopped.

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
            method: How the student learns from the teacher.
            data: The images and labels.
            networks: The teacher and the student.
            schedule: How long the student is trained, and with which steps.
            output: How often states are saved; evaluation follows each part.
            hardware: Only the number of micro-batches is used.
        """
        if config is not None:
            do = "Write `hintjax tune CONFIG --over ...`."
            wanted = "the config file as the first argument"
            raise Refusal(message("tune", wanted, f"{config}", do))
        options = configs.check(
            configs.joined(method, data, networks, schedule, output, hardware)
        )
        path = claim(run_dir, options)
        print(f"run directory: {path}")
        tune(options, path, over, candidates, rungs)

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
        options = configs.joined(data, networks)
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


def _from_file(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Takes --config FILE off the arguments, and reads the defaults from FILE.

    `tune` takes FILE as its first argument, too.
    """
    if argv[:1] == ["tune"] and argv[1:2] and not argv[1].startswith("-"):
        return configs.load(argv[1]), [argv[0], *argv[2:]]
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return configs.load(argv[i + 1]), [*argv[:i], *argv[i + 2 :]]
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
            return configs.load(path), [*argv[:i], *argv[i + 1 :]]
    return Config(), list(argv)


if __name__ == "__main__":
    main()
