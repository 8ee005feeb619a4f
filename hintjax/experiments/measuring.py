"""The command `measure`: exported files in the programs that devices run them with."""

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hintjax._checks import FileRefusal, Refusal, integer, message
from hintjax.experiments.evaluating import shipped
from hintjax.experiments.exporting import (
    EXPORTED,
    best_run,
    compared,
    file_logits,
    spread_images,
    student_logits,
)
from hintjax.export import NoConverter
from hintjax.export.runtimes import (
    RUNTIMES,
    Run,
    arena_bytes,
    int8_network,
    run_micro,
)
from hintjax.training.run_directory import write_text

MEASURED = "measured.json"
_PACKAGES = ("jax", "onnxruntime", "ai-edge-litert", "tflite-micro")


class Loaded(NamedTuple):
    """A file in a program that runs it.

    Attributes:
        name: name of the file, with the program if the file has two.
        data: bytes of the file.
        run: the file as a function.
        arena: bytes of memory in TFLite Micro; None if unknown.
    """

    name: str
    data: bytes
    run: Run
    arena: int | None


class Middle(NamedTuple):
    """The median of some numbers, with its 95 % interval.

    The interval holds for any distribution: its ends are two of the sorted numbers.
    """

    median: float
    low: float
    high: float


def middle(numbers: Sequence[float] | np.ndarray) -> Middle:
    """The median of some numbers, with its 95 % interval.

    >>> middle(np.arange(101.0))
    Middle(median=50.0, low=40.0, high=60.0)
    """
    found = np.sort(np.asarray(numbers, np.float64))
    half = 0.98 * np.sqrt(len(found))  # 1.96 sqrt(n) / 2
    low = max(0, int(np.floor(len(found) / 2 - half)))
    high = min(len(found) - 1, int(np.ceil(len(found) / 2 + half)) - 1)
    return Middle(float(np.median(found)), float(found[low]), float(found[high]))


def measure_run(run_dir: Path, files: Sequence[Path] = (), repeats: int = 200) -> None:
    """Measures exported files of a run on its test split, and writes measured.json.

    Each file runs in its own program. The metric and the agreement with the student in
    JAX are of all test images, the latency of one image on one thread of one core. The
    files take turns, and each ratio is of two neighboring times.

    Args:
        run_dir: run directory.
        files: exported files; by default all in RUN_DIR/exported, largest first.
        repeats: number of times that each file is timed.

    Raises:
        Refusal: if there is no file, or a package is missing.
    """
    integer("measure", 2, repeats=repeats)
    path = run_dir.expanduser().resolve()
    with _one_core():
        loaded = [one for file in _files(path, files) for one in _loaded(file)]
        setting, network, variables = shipped(best_run(path), rounding=False)
        student = student_logits(setting, network, variables)
        images = spread_images(setting.dataset.test, 32)
        times = _timed([one.run for one in loaded], images, repeats)
        rows = []
        for one, seconds in zip(loaded, times, strict=True):
            found = compared(setting, student, file_logits(setting, one.run))
            row = {
                "file": one.name,
                "bytes": len(one.data),
                setting.task.name: found.metric,
                "agreement": found.agree / found.images,
                "difference": found.difference,
                "milliseconds": middle(1e3 * seconds)._asdict(),
                "ratio": middle(seconds / times[0])._asdict(),
                "arena": one.arena,
            }
            rows.append(row)
    report = {
        "machine": _machine(),
        "student": {setting.task.name: found.student, "images": found.images},
        "rows": rows,
    }
    write_text(path / MEASURED, json.dumps(report, indent=1))
    _show(report, setting.task.name, setting.task.shown)


def _files(run_dir: Path, files: Sequence[Path]) -> list[Path]:
    """The files to measure."""
    folder = run_dir / EXPORTED
    named = [file.expanduser().resolve() for file in files]
    there = [p for p in sorted(folder.glob("*")) if p.suffix in RUNTIMES]
    found = named or sorted(there, key=lambda p: -p.stat().st_size)
    if not found:
        do = f"Write one with `hintjax export {run_dir}`."
        raise Refusal(message("measure", f"a file in {folder}", "none", do))
    for file in found:
        if file.suffix not in RUNTIMES:
            wanted = f"a file that ends in {', '.join(RUNTIMES)}"
            raise Refusal(message("measure", wanted, file.name))
    return found


def _loaded(file: Path) -> list[Loaded]:
    """A file in its program; int8 also in TFLite Micro, where that is installed."""
    try:
        data = file.read_bytes()
    except OSError as error:
        wanted = "a file that can be read"
        raise FileRefusal(message("measure", wanted, f"{error}")) from error
    loaded = [Loaded(file.name, data, RUNTIMES[file.suffix](data), None)]
    if file.suffix == ".tflite" and int8_network(data):
        with contextlib.suppress(NoConverter):
            name, micro = f"{file.name} (Micro)", run_micro(data)
            loaded.append(Loaded(name, data, micro, arena_bytes(data)))
    return loaded


def _timed(runs: Sequence[Run], images: np.ndarray, repeats: int) -> np.ndarray:
    """The seconds of each function for one image: an array (functions, repeats)."""
    times = np.empty((len(runs), repeats))
    for repeat in range(-3, repeats):  # the first three are not counted
        image = images[repeat % len(images)][None]
        for at, run in enumerate(runs):
            start = time.perf_counter()
            run(image)
            spent = time.perf_counter() - start
            if repeat >= 0:
                times[at, repeat] = spent
    return times


@contextlib.contextmanager
def _one_core() -> Any:
    """This process runs on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _machine() -> dict[str, Any]:
    """The processor and the versions."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"processor": platform.machine(), "cores": 1, **versions}


def _show(
    report: Mapping[str, Any], metric: str, shown: Callable[[float], str]
) -> None:
    """Prints the table."""
    student = shown(report["student"][metric])
    print(
        f"student in JAX: test {metric} {student}, {report['student']['images']} images"
    )
    head = ("file", "bytes", metric, "agreement", "difference", "ms", "ratio", "arena")
    print(f"{head[0]:32}" + "".join(f"{one:>12}" for one in head[1:]))
    for row in report["rows"]:
        ratio = row["ratio"]
        interval = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
        arena = "" if row["arena"] is None else f"{row['arena']:,}"
        print(
            f"{row['file']:32}{row['bytes']:12,}{shown(row[metric]):>12}"
            f"{100 * row['agreement']:11.1f}%{row['difference']:12.2g}"
            f"{row['milliseconds']['median']:12.3f}{ratio['median']:12.2f}{arena:>12}"
            f"  {interval}"
        )
    print("ms: one image on one core, the median. ratio: to the first file, with its")
    print("95 % interval. arena: bytes of memory in TFLite Micro on this machine.")
