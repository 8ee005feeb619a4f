"""The command `export`: a run's student in a file, checked on the test split."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from hintjax._checks import FileRefusal, Refusal, integer, message
from hintjax.data import Source, evaluation_batches
from hintjax.experiments import config as configs
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.evaluating import shipped
from hintjax.experiments.finished import RESULT, evaluation_size
from hintjax.experiments.setting import Setting
from hintjax.experiments.tasks import TASKS
from hintjax.export import (
    NoConverter,
    Standalone,
    c_array,
    layer_errors,
    onnx,
    stablehlo,
    standalone,
    tflite,
    tflite_int8,
)
from hintjax.export.converters import need
from hintjax.export.runtimes import (
    Logits,
    Run,
    arena_bytes,
    run_onnx,
    run_stablehlo,
    run_tflite,
)
from hintjax.networks import Network, Variables, Wants
from hintjax.training.run_directory import read_json

EXPORTED = "exported"  # folder of a run directory
CHECKOUT = Path(__file__).parents[2]
_SHOWN = 5  # layers


class Format(NamedTuple):
    """A format of `hintjax export --to`.

    Attributes:
        suffix: end of the name of the file.
        packages: packages that convert, as they are imported.
        write: `(model, batch, representative) -> data`.
        run: how the data is run.
        files: `(data, name) -> {suffix: text or bytes}`, the files of the data.
        any_batch: whether a batch can have any size.
        int8: whether the network is quantized.
    """

    suffix: str
    packages: Sequence[str]
    write: Callable[[Standalone, int | None, np.ndarray], bytes]
    run: Callable[[bytes], Run]
    files: Callable[[bytes, str], Mapping[str, bytes]] | None = None
    any_batch: bool = False
    int8: bool = False


def _arena(data: bytes) -> int | None:
    """The memory that a microcontroller needs; None if it cannot be measured here."""
    try:
        return arena_bytes(data)
    except NoConverter:
        return None


def _c_files(data: bytes, name: str) -> dict[str, bytes]:
    """The C files of an int8 network."""
    made = c_array(data, name, _arena(data))
    return {".c": made.source.encode(), ".h": made.header.encode()}


def _int8(model: Standalone, batch: int | None, representative: np.ndarray) -> bytes:
    """An int8 network; it takes one image at a time."""
    return tflite_int8(model, representative)


FORMATS = {
    "stablehlo": Format(
        ".stablehlo",
        ("flatbuffers",),
        lambda model, batch, _: stablehlo(model, batch),
        run_stablehlo,
        any_batch=True,
    ),
    "onnx": Format(
        ".onnx",
        ("jax2onnx",),
        lambda model, batch, _: onnx(model, batch),
        run_onnx,
        any_batch=True,
    ),
    "tflite": Format(
        ".tflite",
        ("tensorflow",),
        lambda model, batch, _: tflite(model, batch or 1),
        run_tflite,
    ),
    "tflite-int8": Format(
        "-int8.tflite", ("tensorflow",), _int8, run_tflite, int8=True
    ),
    "c-array": Format(
        ".c",
        ("tensorflow", "ai_edge_litert"),
        _int8,
        run_tflite,
        files=_c_files,
        int8=True,
    ),
}


def export_run(
    run_dir: Path,
    to: str,
    batch: int | Literal["symbolic"] | None = None,
    output: Path | None = None,
    representative: int = 256,
) -> None:
    """Exports the student of a finished run, and checks the file on the test split.

    Args:
        run_dir: run directory. Of a comparison, the run that is best on the validation
            split is exported.
        to: name of the format.
        batch: number of images in a batch, or "symbolic" for any number; by default
            any number, or 1 in formats that need a number.
        output: the file.
        representative: number of training images that set the ranges of int8.

    Raises:
        Refusal: if the run is not finished, or a package is missing.
    """
    form = FORMATS[to]
    need("export", *form.packages)
    integer("export", 1, representative=representative)
    if batch == "symbolic" and not form.any_batch:
        do = "Leave --batch out."
        raise Refusal(message("export", f"a number of images for {to}", f"{batch}", do))
    size = None if batch == "symbolic" else batch
    if form.int8 and size not in (None, 1):
        raise Refusal(message("export", "batch 1 for an int8 network", f"{size}"))
    path = run_dir.expanduser().resolve()
    setting, network, variables = shipped(best_run(path), rounding=False)
    model = alone(setting, network, variables)
    images = spread_images(setting.dataset.train, representative)
    data = form.write(model, size, images)
    target = output or path / EXPORTED / f"student{form.suffix}"
    _write(form, data, target.expanduser())
    try:
        run = form.run(data)
    except NoConverter as error:
        print(f"The file is not checked: {error}")
    else:
        _show_agreement(setting, network, variables, run)
    if form.int8:
        _show_layers(model, images)


def best_run(run_dir: Path) -> Path:
    """The run of a comparison that is best on the validation split; else the run.

    Args:
        run_dir: directory of a run, or of a finished comparison.

    Raises:
        Refusal: if the runs of the comparison are gone.
    """
    if not (run_dir / REPORT).exists():
        return run_dir
    task = TASKS[configs.load(run_dir).task]
    found = {
        path.parent: read_json(path)[f"validation/{task.name}"]
        for path in sorted(run_dir.glob(f"*/rate*-seed*/{RESULT}"))
    }
    if not found:
        wanted, do = "the runs of the comparison", "Name the directory of one run."
        raise Refusal(message("export", wanted, f"none in {run_dir}", do))
    best = task.best(found)
    name, value = best.relative_to(run_dir), task.shown(found[best])
    print(f"the best run on the validation split: {name} ({task.name} {value})")
    return best


def alone(setting: Setting, network: Network, variables: Variables) -> Standalone:
    """The network of a run with the standardization and the classes of its data."""
    dataset = setting.dataset
    mean, std = map(np.asarray, dataset.standardize)
    height, width, channels = dataset.train.shape
    names = dataset.class_names
    return standalone(
        network, variables, (height, width, channels), mean=mean, std=std, classes=names
    )


def spread_images(
    split: Source, count: int
) -> UInt8[np.ndarray, "n height width channels"]:
    """Some images of a split, evenly spaced."""
    at = np.linspace(0, split.n - 1, min(count, split.n)).astype(int)
    return np.asarray(split.read(at).image)


class Compared(NamedTuple):
    """A file against the student in JAX, on the test split.

    Attributes:
        images: number of images.
        agree: number of images whose class is the same.
        difference: largest difference of a logit.
        metric: metric of the file's logits.
        student: metric of the student's logits.
    """

    images: int
    agree: int
    difference: float
    metric: float
    student: float


def student_logits(setting: Setting, network: Network, variables: Variables) -> Logits:
    """The logits of the student in JAX, of all test images."""

    @jax.jit
    def output(variables, image):
        wants = Wants(output=True)
        return network.apply(*variables, image, wants=wants, train=False)[0].output

    test = setting.dataset.test
    size = evaluation_size(test, setting.config)
    batches = evaluation_batches(test, size, setting.dataset.standardize)
    found = [np.asarray(output(variables, batch["image"])) for batch in batches]
    return np.concatenate(found)[: test.n].astype(np.float32)


def file_logits(setting: Setting, run: Run) -> Logits:
    """The logits of a file, of all test images."""
    test = setting.dataset.test
    size = evaluation_size(test, setting.config)
    starts = range(0, test.n, size)
    rows = (np.arange(start, min(start + size, test.n)) for start in starts)
    return np.concatenate([run(np.asarray(test.read(at).image)) for at in rows])


def compared(setting: Setting, student: Logits, file: Logits) -> Compared:
    """Compares the logits of a file with those of the student."""
    test = setting.dataset.test
    labels = jnp.asarray(test.labels(np.arange(test.n)))

    def metric(logits: Logits) -> float:
        where = jnp.ones(test.n, bool)
        total, count = setting.task.measured(jnp.asarray(logits), labels, where)
        return float(total) / max(int(count), 1)

    same = (student.argmax(-1) == file.argmax(-1)).reshape(test.n, -1).all(1)
    difference = float(np.abs(student - file).max())
    return Compared(test.n, int(same.sum()), difference, metric(file), metric(student))


def _show_agreement(
    setting: Setting, network: Network, variables: Variables, run: Run
) -> None:
    """Prints how a file agrees with the student on the test split."""
    student = student_logits(setting, network, variables)
    found = compared(setting, student, file_logits(setting, run))
    shown, name = setting.task.shown, setting.task.name.replace("_", " ")
    print(
        f"{found.agree} of {found.images} test images have the student's class; the "
        f"largest difference of a logit is {found.difference:.2g}, of logits up to "
        f"{np.abs(student).max():.3g}"
    )
    print(f"test {name}: {shown(found.metric)}, student {shown(found.student)}")


def _show_layers(model: Standalone, images: np.ndarray) -> None:
    """Prints the layers with the largest errors of int8."""
    errors = layer_errors(model, images[:32])
    print("largest errors of int8, in steps of the layer (rounding alone is 0.29):")
    for layer in errors[:_SHOWN]:
        print(f"  {layer.error:5.2f}  {layer.layer}")


def _write(form: Format, data: bytes, target: Path) -> None:
    """Writes the files of a format, and prints their names and sizes."""
    files = {target: data}
    if form.files is not None:
        made = form.files(data, target.stem)
        files = {target.with_suffix(suffix): each for suffix, each in made.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, each in files.items():
            staging = path.with_name(f".{path.name}.tmp")
            staging.write_bytes(each)
            staging.replace(path)
            print(f"file: {path}, {len(each):,} bytes")
    except OSError as error:
        wanted = "a file that can be written"
        raise FileRefusal(message("export", wanted, f"{error}")) from error


def elsewhere(argv: Sequence[str], missing: NoConverter) -> int | None:
    """Runs the command in the environment that `./setup.sh --export` makes.

    Args:
        argv: arguments of the command.
        missing: the package that is missing in this environment.

    Returns:
        The exit code; None if there is no other environment.
    """
    folder = CHECKOUT / ".venv-export"
    python = folder / "bin" / "python"
    if not python.exists() or Path(sys.prefix).resolve() == folder.resolve():
        return None
    name = f"{missing}".split(", got ")[-1].split(".")[0]
    print(f"There is {name} here, so {python} runs the command.", flush=True)
    command = [python, "-m", "hintjax.cli", *argv]
    return subprocess.run(command, check=False).returncode
