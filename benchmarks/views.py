"""Accuracy with a few fixed crops per image, against new crops in every epoch.

    python benchmarks/views.py --data-dir DIR --work DIR \
        --out benchmarks/results/views_cpu.json

Device: any; the committed numbers are from two CPU cores, on which other programs ran.
Minutes: 60 there; 10 of processor time. Expected: one fixed crop is worse than new
crops, by 1.5 points of test accuracy; four and eight cannot be told apart from them.

A cache of the teacher holds the features of k views of each image, and epoch e shows
view e mod k. A live teacher can see new crops in every epoch. This benchmark says what
the fixed views cost. resnet20 teaches resnet8 by KD, on 1000 images of MNIST at 14 x 14
pixels, padded by 2 pixels before a random crop. The teacher has seen all images of the
training split. The arms differ in nothing but the crops:

    none    no crops
    live    new crops in every epoch, and a live teacher
    k       k fixed crops of each image, from a cache of float32 rows

Every seed of an arm is one run; the differences to `live` are paired by seed. A run
that is finished in `--work` is not run again, so an interrupted benchmark continues.
The committed numbers decide the default of `--views`. They cannot say what crops are
worth: here they bring no gain over no crops, and a difference of less than a point is
within chance. After each seed, the script prints the minutes that the others will take.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

from hintjax.experiments.caching import with_cache
from hintjax.experiments.config import Config
from hintjax.experiments.distill import keep_compiled
from hintjax.experiments.finished import RESULT
from hintjax.experiments.recipes import KD
from hintjax.experiments.run import run
from hintjax.experiments.setting import Setting, prepare
from hintjax.experiments.statistics import paired, summary
from hintjax.experiments.teaching import teacher_variables
from hintjax.networks import Variables

LIVE, NONE = "live", "none"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    keep_compiled(options.work / "compiled")
    config = _config(options)
    start = time.perf_counter()
    found = _measured(config, options)
    record = {
        "benchmark": "views",
        "machine": machine,
        "minutes": (time.perf_counter() - start) / 60,
        "dataset": config.dataset,
        "images": config.limit,
        "size": config.size,
        "pad": config.pad,
        "teacher": config.teacher,
        "student": config.student,
        "method": "kd",
        "epochs": config.epochs,
        "batch": config.batch_size,
        "seeds": options.seeds,
        "test_accuracy": found,
        "arms": {name: _compared(found, name) for name in found if name != "teacher"},
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _measured(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The test accuracy of the teacher, and of each seed of each arm."""
    setting = prepare(config, teach=True)
    teacher = teacher_variables(setting, options.work, show=lambda *step: None)
    taught = json.loads((options.work / "teacher" / RESULT).read_text())
    arms = {
        name: _ready(setting, name, options.work / name, teacher)
        for name in (NONE, LIVE, *map(str, options.views))
    }
    found: dict[str, Any] = {name: [] for name in arms}
    start = time.perf_counter()
    for seed in range(options.seeds):
        for name, ready in arms.items():
            folder = options.work / name / f"seed{seed}"
            found[name].append(_accuracy(ready, folder, teacher, seed))
        left = options.seeds - seed - 1
        minutes = left * (time.perf_counter() - start) / 60 / (seed + 1)
        print(f"seed {seed} is done; about {minutes:.0f} minutes for {left} others")
    return {"teacher": taught["test/accuracy"]} | found


def _ready(setting: Setting, name: str, folder: Path, teacher: Variables) -> Setting:
    """The setting of an arm, with its cache if it has one."""
    if name == LIVE:
        return setting
    if name == NONE:
        return setting._replace(config=dataclasses.replace(setting.config, pad=0))
    config = dataclasses.replace(setting.config, views=int(name), cache=True)
    return with_cache(setting._replace(config=config), folder / "cache", [KD], teacher)


def _accuracy(setting: Setting, folder: Path, teacher: Variables, seed: int) -> float:
    """The test accuracy of one run, which is trained unless it is finished."""
    result = folder / RESULT
    if not result.exists():
        how = {"resume": True, "show": lambda *step: None}
        run(setting, folder, KD, teacher=teacher, seed=seed, **how)
    return json.loads(result.read_text())["test/accuracy"]


def _compared(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Mean and spread of an arm, and its differences to the live teacher."""
    own, against = summary(found[name]), paired(found[name], found[LIVE])
    return {
        "mean": own.mean,
        "std": own.std,
        "minus_live": {
            "mean": against.mean,
            "low": against.low,
            "high": against.high,
            "verdict": against.verdict,
        },
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as text, in percent."""
    machine, accuracy = record["machine"], record["test_accuracy"]
    lines = [
        f"{record['dataset']}, {record['images']} images, {record['seeds']} seeds of "
        + f"{record['epochs']} epochs on {machine['device']} ({machine['processor']})",
        f"teacher {100 * accuracy['teacher']:.2f}",
        "",
        f"{'crops':8}{'mean':>8}{'std':>7}{'minus live':>12}{'95 %':>18}",
    ]
    for name, one in record["arms"].items():
        less = one["minus_live"]
        interval = f"{100 * less['low']:+.2f} to {100 * less['high']:+.2f}"
        lines.append(
            f"{name:8}{100 * one['mean']:8.2f}{100 * one['std']:7.2f}"
            f"{100 * less['mean']:+12.2f}{interval:>18}  {less['verdict']}"
        )
    return "\n".join(lines)


def _config(options: argparse.Namespace) -> Config:
    """The config that all arms share."""
    return Config(
        dataset=options.dataset,
        data_dir=options.data_dir,
        size=options.size,
        limit=options.limit,
        pad=options.pad,
        teacher=options.teacher,
        teacher_epochs=options.teacher_epochs,
        student=options.student,
        method="kd",
        epochs=options.epochs,
        evaluate_every=options.epochs,
        checkpoint_every=options.epochs,
        batch_size=options.batch,
        devices=1,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    measure.add_runs(parser, dataset="mnist", seeds=5)
    add = parser.add_argument
    add("--views", nargs="+", type=int, default=[1, 2, 4, 8], help="numbers of views")
    add("--size", type=int, default=14, help="height and width of the images")
    add("--limit", type=int, default=1000, help="training images of the student")
    add("--pad", type=int, default=2, help="pixels of padding before a crop")
    add("--teacher", default="hintjax.models:resnet20", help="package.module:factory")
    add("--student", default="hintjax.models:resnet8", help="package.module:factory")
    add("--teacher-epochs", type=int, default=1, help="epochs of the teacher")
    add("--epochs", type=int, default=24, help="epochs of the student")
    options = parser.parse_args(arguments)
    if options.small:
        options.dataset, options.size, options.limit = "digits", None, 32
        options.teacher = options.student = "hintjax.models:plain_wide"
        options.views, options.seeds, options.epochs = [2], 2, 2
        options.batch, options.pad = 16, 1
    return options


if __name__ == "__main__":
    main()
