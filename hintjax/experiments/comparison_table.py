"""A comparison in numbers."""

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
from hintjax.experiments.finished import accuracy, evaluation_size
from hintjax.experiments.setting import Setting
from hintjax.experiments.statistics import paired, summary
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
        "teacher": _size(teacher.params),
        "student": _size(
            setting.student.init(jax.random.key(0), setting.inputs).params
        ),
    }
    labels = dataset.test.labels(np.arange(dataset.test.n))
    chance = float(np.bincount(labels).max() / dataset.test.n)
    rows = []
    for name, arm in found.items():
        spread = summary(arm["test"])
        rows.append(
            {
                "arm": name,
                "mean": spread.mean,
                "std": spread.std,
                "seeds": arm["test"],
                # Twice chance is far from both: an arm learns, or it does not.
                "trained": sum(accuracy > 2 * chance for accuracy in arm["test"]),
                "r2": float(np.mean(arm["r2"])),
                "seconds": float(np.mean(arm["seconds"])),
                "rate": arm["rate"],
            }
        )
    best = max(baselines, key=lambda name: max(found[name]["validation"].values()))
    differences = {
        name: paired(arm["test"], found[best]["test"])._asdict()
        for name, arm in found.items()
        if name != best
    }
    return {
        "dataset": setting.config.dataset,
        "machine": _machine(),
        "teacher": {
            "accuracy": _accuracy(setting, teacher),
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

    teacher = report["teacher"]
    title = (
        f"{report['dataset']}: student {report['parameters']:,} parameters, "
        f"{report['compression']:.1f} times fewer than the teacher"
    )
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for name in ("arm", "test accuracy", "each seed", "trained", "R²", "rate", "s"):
        side = "left" if name == "arm" else "right"
        shown.add_column(name, justify=side, no_wrap=True)
    found = teacher["accuracy"]
    judged = "other classes" if math.isnan(found) else f"{100 * found:.1f}"
    shown.add_row("teacher", judged)
    for row in report["rows"]:
        spread = "" if math.isnan(row["std"]) else f" ± {100 * row['std']:.1f}"
        shown.add_row(
            row["arm"],
            f"{100 * row['mean']:.1f}{spread}",
            " ".join(f"{100 * accuracy:.1f}" for accuracy in row["seeds"]),
            f"{row['trained']}/{len(row['seeds'])}",
            f"{row['r2']:.2f}",
            f"{row['rate']:g}",
            f"{row['seconds']:.1f}",
        )
    # Rows stay whole, whatever the width of the terminal or the file.
    Console(width=max(Console().width, 120)).print(shown)
    print(
        f"Difference from {report['baseline']} in percentage points, with 95 %\n"
        f"intervals of the paired differences over the seeds:"
    )
    for name, difference in report["differences"].items():
        verdict = "" if difference["told_apart"] else "  cannot be told apart"
        print(
            f"  {name:26} {100 * difference['mean']:+6.1f} "
            f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
            f"{verdict}"
        )
    print(
        "trained: number of seeds above twice chance. R²: part of the hint's variance\n"
        "that a linear map from the guided layer explains, on test images.\n"
        "s: training seconds."
    )


def _accuracy(setting: Setting, teacher: Variables) -> float:
    """The accuracy of the teacher on the test split; nan if it knows other classes."""
    if not setting.places.same_outputs:
        return math.nan
    test, standardize = setting.dataset.test, setting.dataset.standardize
    size = evaluation_size(test, setting.config)
    return accuracy(setting.teacher, teacher, test, standardize, size)


def _machine() -> dict[str, Any]:
    """Device and versions, without which the numbers are worth little."""
    names = ("hintjax", "jax", "flax", "optax", "orbax-checkpoint")
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _size(params: PyTree) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
