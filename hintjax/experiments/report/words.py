"""Numbers and names of a report, in words."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hintjax.experiments.config import Config
from hintjax.experiments.statistics import proportion
from hintjax.experiments.tasks import Task

SPREAD = (
    "The interval is Wilson's 95 % interval for the number of test examples. It does "
    "not say how much another seed would change the result."
)


def dataset_of(config: Config) -> str:
    """The name of the dataset, without its directories."""
    return Path(config.dataset).stem if config.dataset else ""


def counted(name: str, facts: Mapping[str, Any]) -> str:
    """A dataset with the sizes of its splits."""
    if "train" not in facts:
        return name
    return f"{name}: {facts['train']:,} training and {facts['test']:,} test examples"


def sized(name: str, parameters: int | None) -> str:
    """A network with the number of its parameters."""
    return name if parameters is None else f"{name}: {parameters:,} parameters"


def r2_of(pair: Mapping[str, Any]) -> str:
    """R^2 of a pair before and after training, in words."""
    before, after = (
        "unknown" if pair[name] is None else f"{pair[name]:.2f}"
        for name in ("before", "after")
    )
    return f"{before} before training, {after} after it"


def device_of(machine: Mapping[str, Any]) -> dict[str, str]:
    """The device and the versions, in words."""
    if not machine:
        return {}
    others = [f"{k} {v}" for k, v in machine.items() if k not in ("device", "cores")]
    device = f"{machine['device']}, {machine['cores']} CPU cores"
    return {"device": device, "versions": ", ".join(others)}


def option_of(config: Config, name: str) -> str:
    """The value of an option, as text."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def words_of(task: Task) -> str:
    """The name of the metric of a task."""
    return task.name.replace("_", " ")


def shown(task: Task, value: float) -> str:
    """A value of the metric, with its unit; nan is a run without labels."""
    if math.isnan(value):
        return "no labels"
    return f"{task.shown(value)}{' %' if task.larger else ''}"


def interval_of(task: Task, low: float, high: float) -> str:
    """An interval of the metric."""
    return f"[{task.shown(low)}, {task.shown(high)}]"


def wilson_of(classes: Mapping[str, Any] | None) -> str:
    """Wilson's interval of an accuracy, in percent; empty without counts."""
    if not classes:
        return ""
    low, high = proportion(classes["right"], classes["examples"])
    return f" [{100 * low:.1f}, {100 * high:.1f}]"
