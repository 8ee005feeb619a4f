"""The report of a comparison: its arms, their differences, and the verdicts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hintjax.experiments import config as configs
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.comparison_picture import COMPARISON
from hintjax.experiments.comparison_table import differences, unit_of
from hintjax.experiments.config import Config
from hintjax.experiments.report import page
from hintjax.experiments.report.classes import classes_of
from hintjax.experiments.report.curves import curves_of
from hintjax.experiments.report.drawn import from_file, without_pictures
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.parts import against_size, configuration, warnings_of
from hintjax.experiments.report.ran import Ran, read_run
from hintjax.experiments.report.words import (
    dataset_of,
    device_of,
    interval_of,
    sized,
    words_of,
)
from hintjax.experiments.statistics import summary
from hintjax.experiments.tasks import TASKS, Task

_PICTURE = "Validation curves, test metrics and attention maps of all arms."


def comparison_page(run_dir: Path) -> str:
    """The report of a comparison."""
    report = json.loads((run_dir / REPORT).read_text())
    config, task = configs.load(run_dir), TASKS[report.get("task", Config.task)]
    title = f"Comparison on {dataset_of(config)}"
    runs = {
        row["arm"]: [read_run(run_dir / one) for one in row.get("runs", ())]
        for row in report["rows"]
    }
    points = {
        "teacher": (report["teacher"]["parameters"], report["teacher"][task.name]),
        **{row["arm"]: (report["parameters"], row["mean"]) for row in report["rows"]},
    }
    points = {name: at for name, at in points.items() if not math.isnan(at[1])}
    arms = [
        page.folded(name, *curves_of(found[0]), *classes_of(found[0]))
        for name, found in runs.items()
        if found
    ]
    return page.page(
        title,
        warnings_of(run_dir),
        page.section("What was run", _what_was_compared(report, config)),
        page.section("Results", *_arms(report, task, runs)),
        page.section("Pictures", page.wide(from_file(run_dir / COMPARISON, _PICTURE))),
        page.section("Metric and size", against_size(task, points)),
        page.section("Each arm, its first seed", *arms),
        page.section("Configuration", configuration(config)),
        without_pictures(),
    )


def _arms(
    report: Mapping[str, Any], task: Task, runs: Mapping[str, Sequence[Ran]]
) -> list[Html]:
    """The table of the arms, and the differences with their verdicts."""
    rows = []
    known = report["teacher"][task.name]
    rows.append(
        ["teacher", "other classes" if math.isnan(known) else task.shown(known)]
    )
    for row in report["rows"]:
        spread = summary(row["seeds"])
        several = spread.count > 1
        interval = interval_of(task, spread.low, spread.high) if several else ""
        errors = [run.facts["classes"] for run in runs[row["arm"]] if run.facts]
        ece = [one["ece"] for one in errors if one]
        rows.append(
            [
                row["arm"],
                task.shown(row["mean"]),
                interval,
                " ".join(map(task.shown, row["seeds"])),
                f"{row['trained']}/{len(row['seeds'])}",
                f"{row['r2']:.2f}",
                f"{sum(ece) / len(ece):.3f}" if ece else "",
                f"{row['rate']:g}",
                f"{row['seconds']:.1f}",
            ]
        )
    name = f"test {words_of(task)}{', %' if task.larger else ''}"
    head = ("arm", name, "95 % interval", "each seed", "trained", "R²", "ECE")
    rows[0] += [""] * (len(head) + 2 - len(rows[0]))
    against = report["baseline"]
    verdicts = [
        f"{arm}: {mean} {interval}{unit_of(task)} against {against}"
        f"{f', {verdict}' if verdict else ''}."
        for arm, mean, interval, verdict in differences(report)
    ]
    return [
        page.table((*head, "rate", "seconds"), rows, f"Trained: seeds {task.above()}."),
        page.paragraph("Differences, with 95 % intervals of the paired seeds:"),
        page.points(verdicts),
    ]


def _what_was_compared(report: Mapping[str, Any], config: Config) -> Html:
    """The networks and the machine of a comparison."""
    teacher = report["teacher"]["parameters"]
    return page.values(
        {
            "dataset": dataset_of(config),
            "teacher": sized(config.teacher, teacher),
            "student": sized(config.student, report["parameters"]),
            "compression": f"{report['compression']:.1f} x",
            "pairs": ", ".join(
                f"{guided} = {hint}" for guided, hint in report["pairs"]
            ),
            "seeds": config.seeds,
            "epochs": config.epochs,
            **device_of(report["machine"]),
        }
    )
