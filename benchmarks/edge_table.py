r"""What a student for a device keeps of its teacher: bytes, accuracy, latency, memory.

    ./setup.sh --export
    .venv-export/bin/python benchmarks/edge_table.py RUN_DIR [RUN_DIR ...] \
        --out benchmarks/results/edge_table.json

Each RUN_DIR is a finished comparison of `hintjax distill`, such as those of
benchmarks/results/README.md. Results of other data that the file of --out already has
stay in it. Device: a CPU; the committed numbers are from a busy machine of two cores.
Minutes: 4. Expected: a student with a tenth of the teacher's parameters has a file of
int8 at least 10 times smaller than the teacher's float file.

The teacher and the chosen runs of every arm, with all seeds, are exported as TFLite in
float ("float"), as StableHLO in float ("stablehlo"), and as TFLite in int8 ("int8":
weights and activations, from 256 training images). LiteRT, or JAX for StableHLO, runs
every file on the whole test split. Then the table shows, for each arm and file:

    bytes     of the file of the first seed
    smaller   bytes of the teacher's float file / bytes
    accuracy  of the file: mean and sample standard deviation over seeds
    lost      points of accuracy below the teacher's float file, of the mean
    int8      points of accuracy below the float files of the same runs, of the mean
    agrees    percent of test images with the class of the network in JAX, of the mean
    latency   of one image on one thread in LiteRT, divided by that of the teacher's
              float file in the same round; the files of the first seed take turns
    arena     memory in TFLite Micro, for int8

The aims are: at least 10 times smaller, at most 1 point lost (3 on CIFAR-10), and int8
within 0.3 points of float. Each row names the aims that it misses; the teacher has only
that of int8. The means alone decide, so that with few seeds a miss can be chance.
"""

import argparse
import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import measure
import numpy as np

from hintjax.experiments import config as configs
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.evaluating import shipped
from hintjax.experiments.exporting import (
    FORMATS,
    alone,
    compared,
    file_logits,
    spread_images,
    student_logits,
)
from hintjax.experiments.statistics import summary
from hintjax.experiments.teacher import teacher_of
from hintjax.export import NoConverter
from hintjax.export.runtimes import Run, arena_bytes
from hintjax.training.run_directory import read_json

# Formats of `hintjax export`.
FILES = {"float": "tflite", "stablehlo": "stablehlo", "int8": "tflite-int8"}
SMALLER, INT8 = 10.0, 0.3  # aims; points of accuracy for int8
LOST = {"cifar10": 3.0}  # aim in points of accuracy, by dataset
_LOST = 1.0  # of all other datasets
TEACHER = "teacher"
_REPRESENTATIVE = 256  # training images that set the ranges of int8
_TOLD = (
    "dataset",
    "student",
    "teacher",
    "size",
    "limit",
    "epochs",
    "hint_epochs",
    "teacher_epochs",
    "batch_size",
    "rates",
    "learning_rate",
    "cosine",
    "seeds",
)
_PACKAGES = ("tensorflow", "ai-edge-litert", "tflite-micro")


class File(NamedTuple):
    """An exported network.

    Attributes:
        data: bytes of the file.
        run: the file as a function of images.
        parameters: number of the network's parameters.
        accuracy: of the file, on the test split.
        agreement: fraction of test images with the class of the network in JAX.
        images: number of test images.
        image: one of them, for the latency.
    """

    data: bytes
    run: Run
    parameters: int
    accuracy: float
    agreement: float
    images: int
    image: np.ndarray


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    data = [_measured(path, options) for path in options.runs]
    if options.out and options.out.exists():
        fresh = {named(one["config"]) for one in data}
        before = read_json(options.out)["data"]
        data = [one for one in before if named(one["config"]) not in fresh] + data
    record = {
        "benchmark": "edge_table",
        "aims": {"smaller": SMALLER, "lost": {**LOST, "others": _LOST}, "int8": INT8},
        "representative": _REPRESENTATIVE,
        "data": data,
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _measured(run_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures the files of one comparison."""
    machine = measure.machine()
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine["versions"][name] = importlib.metadata.version(name)
    report, config = read_json(run_dir / REPORT), configs.load(run_dir)
    taught = teacher_of(config.teacher).run_dir or run_dir / TEACHER
    arms = {TEACHER: [taught]}
    for row in report["rows"]:
        arms[row["arm"]] = [run_dir / name for name in row["runs"]]
    found: dict[tuple[str, str], list[File]] = {}
    for arm, runs in arms.items():
        files = [_files(run) for run in runs]
        for form in FILES:
            found[arm, form] = [each[form] for each in files]
    firsts = {
        f"{arm}, {form}": files[0]
        for (arm, form), files in found.items()
        if form != "stablehlo"
    }
    runs = {name: partial(file.run, file.image) for name, file in firsts.items()}
    seconds = measure.interleave(runs, options.rounds, options.steps)
    rows = []
    for (arm, form), files in found.items():
        name, first = f"{arm}, {form}", [f"{TEACHER}, float"]
        timed = name in seconds
        rows.append(
            {
                "arm": arm,
                "file": form,
                "parameters": files[0].parameters,
                "bytes": len(files[0].data),
                "accuracy": [file.accuracy for file in files],
                "agreement": [file.agreement for file in files],
                "step_seconds": measure.summary(seconds[name]) if timed else None,
                "over_teacher": measure.paired(seconds, name, first) if timed else None,
                "arena": _arena(files[0].data) if form == "int8" else None,
            }
        )
    return {
        "machine": machine,
        "rounds": options.rounds,
        "steps": options.steps,
        "config": _told(config),
        "images": files[0].images,
        "rows": judged(rows, aim(config.dataset)),
    }


def _told(config: configs.Config) -> dict[str, Any]:
    """The options that the record keeps; of a teacher's run, its network and length."""
    run_dir = teacher_of(config.teacher).run_dir
    told = {name: getattr(config, name) for name in _TOLD}
    if run_dir is None:
        return told
    own = configs.load(run_dir)
    return {**told, "teacher": own.student, "teacher_epochs": own.epochs}


def aim(dataset: str) -> float:
    """The points of accuracy that a student may lose.

    >>> aim("cifar10:3.0.2"), aim("digits")
    (3.0, 1.0)
    """
    return LOST.get(dataset.partition(":")[0], _LOST)


def _files(run_dir: Path) -> dict[str, File]:
    """The files of one run, each run on the whole test split."""
    setting, network, variables = shipped(run_dir)
    model, train = alone(setting, network, variables), setting.dataset.train
    wanted = student_logits(setting, network, variables)
    found = {}
    for form, to in FILES.items():
        images = spread_images(train, _REPRESENTATIVE)
        data = FORMATS[to].write(model, None, images)
        run = FORMATS[to].run(data)
        same = compared(setting, wanted, file_logits(setting, run))
        found[form] = File(
            data=data,
            run=run,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
            accuracy=same.metric,
            agreement=same.agree / same.images,
            images=same.images,
            image=spread_images(setting.dataset.test, 1),
        )
        print(f"{run_dir}, {form}: {100 * same.metric:.2f}", flush=True)
    return found


def _arena(data: bytes) -> int | None:
    """The memory in TFLite Micro; None if it is not installed."""
    try:
        return arena_bytes(data)
    except NoConverter:
        return None


def judged(
    rows: Sequence[Mapping[str, Any]], lost: float = _LOST
) -> list[dict[str, Any]]:
    """The rows with their comparisons and the aims that they miss.

    Args:
        rows: dicts with `arm`, `file`, `bytes` and `accuracy` (one per seed). The
            teacher's float file is among them, and a float file for each int8 file.
        lost: points of accuracy that a student may lose; see `aim`.

    Returns:
        The rows with `smaller` (factor), `mean` and `std` (fractions; no std of one
        seed), `lost` and `int8` (points; `int8` is None for float), and `misses`.
    """
    means = {(row["arm"], row["file"]): np.mean(row["accuracy"]) for row in rows}
    (whole,) = (
        row["bytes"] for row in rows if (row["arm"], row["file"]) == (TEACHER, "float")
    )
    found = []
    for row in rows:
        seeds = summary(row["accuracy"])
        floating = means[row["arm"], "float"]
        added = {
            "smaller": whole / row["bytes"],
            "mean": seeds.mean,
            "std": seeds.std if seeds.count > 1 else None,
            "lost": 100 * float(means[TEACHER, "float"] - seeds.mean),
            "int8": 100 * float(floating - seeds.mean)
            if row["file"] == "int8"
            else None,
        }
        found.append({**row, **added})
    return [{**row, "misses": misses(row, lost)} for row in found]


def misses(row: Mapping[str, Any], lost: float = _LOST) -> list[str]:
    """The names of the aims that a row misses; a teacher has only that of int8.

    >>> misses({"arm": "kd", "smaller": 9.9, "lost": 1.0, "int8": -0.4})
    ['smaller', 'int8']
    """
    student = row["arm"] != TEACHER
    failed = {
        "smaller": student and row["smaller"] < SMALLER,
        "lost": student and round(row["lost"], 6) > lost,
        "int8": row["int8"] is not None and abs(round(row["int8"], 6)) > INT8,
    }
    return [name for name, fails in failed.items() if fails]


HEAD = (
    "data: student",
    "network",
    "file",
    "bytes",
    "smaller",
    "accuracy",
    "lost",
    "int8",
    "agrees",
    "latency",
    "arena",
    "misses",
)


def cells(
    record: Mapping[str, Any], files: Sequence[str] = tuple(FILES)
) -> list[tuple[str, ...]]:
    """The table as texts: one tuple for each row, in the order of `HEAD`."""
    found = []
    for data in record["data"]:
        for row in data["rows"]:
            if row["file"] not in files:
                continue
            std = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
            ratio = row["over_teacher"]
            # A loss of less than 0.005 points is no loss.
            lost, int8 = (
                "" if each is None else f"{each + 0.0:.2f}".replace("-0.00", "0.00")
                for each in (row["lost"], row["int8"])
            )
            each = (
                named(data["config"]),
                row["arm"],
                row["file"],
                f"{row['bytes']:,}",
                f"{row['smaller']:.1f}",
                f"{100 * row['mean']:.1f}{std}",
                lost,
                int8,
                f"{100 * np.mean(row['agreement']):.1f}",
                ""
                if ratio is None
                else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratio),
                "" if row["arena"] is None else f"{row['arena']:,}",
                ", ".join(row["misses"]) or "none",
            )
            found.append(each)
    return found


def named(config: Mapping[str, Any]) -> str:
    """The name of the data, with the size of its images if scaled, and the student.

    >>> named({"dataset": "mnist", "size": 14, "student": "edge_networks:thin"})
    'mnist, 14x14: thin'
    """
    size = config["size"]
    scaled = "" if size is None else f", {size}x{size}"
    return f"{config['dataset']}{scaled}: {config['student'].rpartition(':')[2]}"


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    lines = []
    for data in record["data"]:
        machine = data["machine"]
        told = [f"{name} {value}" for name, value in data["config"].items() if value]
        lines.append(f"{', '.join(told)}; {data['images']:,} test images")
        lines.append(
            f"  on {machine['device']} ({machine['processor']}), load "
            f"{machine['load']}, {data['rounds']} rounds of {data['steps']} images"
        )
    rows = [HEAD, *cells(record)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown(record: Mapping[str, Any], files: Sequence[str] = tuple(FILES)) -> str:
    """The table of the record for a page, with some kinds of files."""
    rows = [HEAD, ("---",) * len(HEAD), *cells(record, files)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="directories of finished comparisons")
    add("--rounds", type=int, default=30, help="rounds to measure")
    add("--steps", type=int, default=50, help="images in a round")
    add("--out", type=Path, help="JSON file of the results; others in it stay")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
