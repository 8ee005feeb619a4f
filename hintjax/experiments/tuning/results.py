"""The results of a tuning: a table, a picture, and a config with the best settings."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.report.drawn import drawing
from hintjax.experiments.setting import Setting
from hintjax.experiments.tasks import TASKS, Task
from hintjax.experiments.tuning.candidates import candidate_of, texts_of
from hintjax.experiments.tuning.halving import TUNING, ranked
from hintjax.training.run_directory import write_text

BEST = "tuned"  # the directory of the config with the best settings
PICTURE, TABLE = "tuning.png", "tuning.md"
_FIRST = ("weight", "learning_rate")  # settings that the picture prefers as its axis

Row = Mapping[str, Any]  # settings, epochs and validation of one candidate


def ordered(task: Task, tried: Sequence[Row]) -> list[int]:
    """Numbers of the candidates, best first: a later rung comes before the metric."""
    found: list[int] = []
    for level in reversed(range(max(len(row["validation"]) for row in tried))):
        here = [n for n, row in enumerate(tried) if len(row["validation"]) == level + 1]
        found += ranked(task, tried, here, level)
    return found


def best_config(config: Config, record: Row) -> Config:
    """The config with the best settings of its method, or of each of its methods.

    Args:
        config: config of the tuning.
        record: contents of a finished tuning.json.
    """
    task = TASKS[config.task]
    best = {
        method: candidate_of(tried[ordered(task, tried)[0]]["settings"])
        for method, tried in record["methods"].items()
    }
    if config.method is not None:
        return configs.check(dataclasses.replace(config, **best[config.method]))
    before = configs.own_settings(config)
    settings = tuple(
        f"{method}.{configs.setting_text(name, value)}"
        for method in config.compare
        for name, value in {**before.get(method, {}), **best[method]}.items()
    )
    return configs.check(dataclasses.replace(config, settings=settings))


def table(task: Task, record: Row) -> list[list[str]]:
    """The rows of the table, with a head: all candidates of all methods, best first.

    Args:
        task: the task.
        record: contents of a finished tuning.json.
    """
    names = dict.fromkeys(
        name
        for tried in record["methods"].values()
        for row in tried
        for name in texts_of(row["settings"])
    )
    rows = [["method", *names, "epochs", f"validation {task.name.replace('_', ' ')}"]]
    for method, tried in record["methods"].items():
        for number in ordered(task, tried):
            row = tried[number]
            own = texts_of(row["settings"])
            value = task.shown(row["validation"][-1])
            shown = (own.get(name, "") for name in names)
            rows.append([method, *shown, f"{row['epochs'][-1]}", value])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["---"] * len(head), *others]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def account(spent: Mapping[str, float]) -> str:
    """Says in one line where the time went."""
    steps, total = spent.get("steps", 0.0), sum(spent.values())
    parts = ", ".join(f"{name} {s:.1f} s" for name, s in sorted(spent.items()))
    return f"{total / max(steps, 1e-9):.2f} times the time of the steps ({parts})"


def write_results(
    setting: Setting, config: Config, run_dir: Path, record: Row
) -> list[list[str]]:
    """Writes the table, the picture and the best config; returns the table.

    Args:
        setting: setting of the tuning.
        config: its config.
        run_dir: its directory.
        record: contents of its finished tuning.json.
    """
    rows = table(setting.task, record)
    best = run_dir / BEST
    best.mkdir(exist_ok=True)
    configs.save(best_config(config, record), best)
    said = f"Chosen on the validation split of {config.dataset}. The time: "
    text = f"{markdown(rows)}\n{said}{account(record['spent'])}.\n"
    write_text(run_dir / TABLE, text)
    if drawing():
        _draw(setting, run_dir, record)
    return rows


def show_results(rows: Sequence[Sequence[str]], run_dir: Path, record: Row) -> None:
    """Prints the table, and the command that trains with the best settings.

    Args:
        rows: result of `write_results`.
        run_dir: directory of the tuning.
        record: contents of its finished tuning.json.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in rows[0]:
        side = "left" if name in ("method", "pairs") else "right"
        shown.add_column(name, justify=side, no_wrap=True)
    for row in rows[1:]:
        shown.add_row(*row)
    # Rows stay whole, whatever the width of the terminal or the file.
    Console(width=max(Console().width, 120)).print(shown)
    print(f"time: {account(record['spent'])}")
    written = [TUNING, TABLE, *([PICTURE] if (run_dir / PICTURE).exists() else [])]
    print(f"results: {', '.join(written)} in {run_dir}")
    print("The test split was not read. Train with the best settings:")
    print(f"  hintjax distill --config {run_dir / BEST}")


def _draw(setting: Setting, run_dir: Path, record: Row) -> None:
    """Draws the metric against a number of the candidates, if one differs."""
    from hintjax.experiments import pictures

    name = _axis(record)
    if name is None:
        return
    points = {}
    for method, tried in record["methods"].items():
        most = max(len(row["validation"]) for row in tried)
        points[method] = [
            pictures.Tried(
                float(texts_of(row["settings"])[name]),
                row["validation"][-1],
                len(row["validation"]) == most,
            )
            for row in tried
            if name in texts_of(row["settings"])
        ]
    figure = pictures.tried(
        {method: some for method, some in points.items() if some},
        xlabel=name.replace("_", " "),
        metric=setting.task.name.replace("_", " "),
        percent=setting.task.larger,
    )
    figure.savefig(run_dir / PICTURE)


def _axis(record: Row) -> str | None:
    """The setting against which the metric is drawn: a number that differs."""
    values: dict[str, set[str]] = {}
    for tried in record["methods"].values():
        for row in tried:
            for name, text in texts_of(row["settings"]).items():
                values.setdefault(name, set()).add(text)
    values.pop("pairs", None)
    names = [*_FIRST, *values]
    return next((name for name in names if len(values.get(name, ())) > 1), None)
