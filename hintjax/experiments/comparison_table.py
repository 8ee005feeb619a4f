"""The table of a comparison: the metrics of its arms, and their differences."""

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from hintjax.experiments.attachment import middle
from hintjax.experiments.config import Config
from hintjax.experiments.finished import evaluation_size, score
from hintjax.experiments.setting import Setting, taught_by
from hintjax.experiments.statistics import paired, summary
from hintjax.experiments.tasks import TASKS, Task
from hintjax.networks import Variables


def table(
    setting: Setting,
    teacher: Variables,
    found: Mapping[str, Mapping[str, Any]],
    baselines: Sequence[str],
) -> dict[str, Any]:
    """The comparison in numbers: one row per arm, and the differences between arms.

    Args:
        setting: see `compare`.
        teacher: variables of the teacher.
        found: result of `compare`.
        baselines: names of arms. Every other arm is compared, seed by seed, with the
            best baseline on the validation split.

    Returns:
        Rows and differences; JSON.
    """
    dataset = setting.dataset
    sizes = {
        "teacher": size_of(teacher.params),
        "student": size_of(
            setting.student.init(jax.random.key(0), setting.inputs).params
        ),
    }
    labels = dataset.test.labels(np.arange(dataset.test.n))
    task, chance = setting.task, setting.task.guessed(np.asarray(labels))
    rows = []
    for name, arm in found.items():
        spread = summary(arm["test"])
        rows.append(
            {
                "arm": name,
                "mean": spread.mean,
                "std": spread.std,
                "seeds": arm["test"],
                # The limit is far from both: an arm learns, or it does not.
                "trained": sum(task.learned(one, chance) for one in arm["test"]),
                "r2": float(np.mean(arm["r2"])),
                "seconds": float(np.mean(arm["seconds"])),
                "rate": arm["rate"],
                "runs": arm["runs"],
            }
        )
    best = task.best({name: max_validated(task, found[name]) for name in baselines})
    differences = {
        name: paired(arm["test"], found[best]["test"])._asdict()
        for name, arm in found.items()
        if name != best
    }
    return {
        "dataset": setting.config.dataset,
        "task": setting.config.task,
        "machine": machine_of(setting),
        "teacher": {
            task.name: _score(setting, teacher),
            "parameters": sizes["teacher"],
        },
        "parameters": sizes["student"],
        "compression": sizes["teacher"] / sizes["student"],
        "chance": chance,
        "pairs": [list(pair) for pair in middle(setting.places)],
        "baseline": best,
        "rows": rows,
        "differences": differences,
    }


def show_table(report: Mapping[str, Any]) -> None:
    """Prints the result of `table`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    teacher, task = report["teacher"], TASKS[report.get("task", Config.task)]
    name = task.name.replace("_", " ")
    title = (
        f"{report['dataset']}: student {report['parameters']:,} parameters, "
        f"{report['compression']:.1f} times fewer than the teacher"
    )
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for head in ("arm", f"test {name}", "each seed", "trained", "R²", "rate", "s"):
        side = "left" if head == "arm" else "right"
        shown.add_column(head, justify=side, no_wrap=True)
    found = teacher[task.name]
    judged = "other classes" if math.isnan(found) else task.shown(found)
    shown.add_row("teacher", judged)
    for row in report["rows"]:
        spread = "" if math.isnan(row["std"]) else f" ± {task.shown(row['std'])}"
        shown.add_row(
            row["arm"],
            f"{task.shown(row['mean'])}{spread}",
            " ".join(map(task.shown, row["seeds"])),
            f"{row['trained']}/{len(row['seeds'])}",
            f"{row['r2']:.2f}",
            f"{row['rate']:g}",
            f"{row['seconds']:.1f}",
        )
    # Rows stay whole, whatever the width of the terminal or the file.
    Console(width=max(Console().width, 120)).print(shown)
    points = unit_of(task)
    print(
        f"Difference from {report['baseline']}{points}, with 95 %\n"
        f"intervals of the paired differences over the seeds:"
    )
    for arm, *numbers, verdict in differences(report):
        print(f"  {arm:26} {numbers[0]:>6} {numbers[1]}  {verdict}".rstrip())
    print(
        f"trained: number of seeds {task.above()}. R²: part of the hint's variance\n"
        "that a linear map from the guided layer explains, on test images.\n"
        "s: training seconds."
    )


def unit_of(task: Task) -> str:
    """The unit of a difference of the metric, in words."""
    if task.larger:
        return " in percentage points"
    return f" in {task.name.replace('_', ' ')}"


def differences(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The differences of a comparison in words.

    Args:
        report: result of `table`.

    Returns:
        For each arm its name, its difference from the baseline, the interval of the
        difference, and the verdict, which is empty if the arms can be told apart.
    """
    task = TASKS[report.get("task", Config.task)]
    found = []
    for arm, one in report["differences"].items():
        interval = f"[{task.signed(one['low'])}, {task.signed(one['high'])}]"
        verdict = "" if one["told_apart"] else "cannot be told apart"
        found.append((arm, task.signed(one["mean"]), interval, verdict))
    return found


def max_validated(task: Task, arm: Mapping[str, Any]) -> float:
    """The metric of an arm on the validation split, at its best rate."""
    rates = arm["validation"]
    return rates[task.best(rates)]


def _score(setting: Setting, teacher: Variables) -> float:
    """The metric of the teacher on the test split; nan if it knows other classes."""
    if not setting.places.same_outputs:
        return math.nan
    test, standardize = setting.dataset.test, setting.dataset.standardize
    size = evaluation_size(test, setting.config)
    where = (test, standardize, size, setting.task)
    return score(taught_by(setting), teacher, *where)


def machine_of(setting: Setting) -> dict[str, Any]:
    """Devices of the runs, and versions, without which the numbers are worth little."""
    devices = 1 if setting.layout is None else setting.layout.mesh.size
    names = ("hintjax", "jax", "flax", "optax", "orbax-checkpoint")
    return {
        "device": f"{devices} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def size_of(params: PyTree) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
