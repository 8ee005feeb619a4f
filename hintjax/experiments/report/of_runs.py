"""The report that compares finished runs."""

import dataclasses
import math
from collections.abc import Sequence

from hintjax.experiments.config import Config
from hintjax.experiments.report import page
from hintjax.experiments.report.curves import validated
from hintjax.experiments.report.drawn import drawn, without_pictures
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.parts import against_size, warnings_of
from hintjax.experiments.report.ran import Ran
from hintjax.experiments.report.words import (
    SPREAD,
    dataset_of,
    option_of,
    wilson_of,
    words_of,
)


def runs_page(runs: Sequence[Ran]) -> str:
    """The report that compares finished runs."""
    task, config = runs[0].task, runs[0].config
    points = {
        run.name: (run.facts["parameters"]["student"], run.score)
        for run in runs
        if run.facts and not math.isnan(run.score)
    }
    metric = {run.name: validated(run) for run in runs}
    words = f"Validation {words_of(task)} over the steps."
    differ = [
        field.name
        for field in dataclasses.fields(Config)
        if len({getattr(run.config, field.name) for run in runs}) > 1
    ]
    rows = [[name, *(option_of(run.config, name) for run in runs)] for name in differ]
    return page.page(
        f"{len(runs)} runs on {dataset_of(config)}",
        *(warnings_of(run.path, run.name) for run in runs),
        page.section("Results", *_rows(runs)),
        page.section(
            "Curves",
            page.pictures(*drawn(words, lambda draw: draw.curves(metric, title=words)))
            if all(metric.values())
            else Html(""),
        ),
        page.section("Metric and size", against_size(task, points)),
        page.section(
            "Options that differ",
            page.table(("option", *(run.name for run in runs)), rows)
            if rows
            else page.paragraph("None."),
        ),
        without_pictures(),
    )


def _rows(runs: Sequence[Ran]) -> list[Html]:
    """The table of finished runs."""
    task, rows = runs[0].task, []
    for run in runs:
        classes, pair = (run.facts.get(name) for name in ("classes", "pair"))
        size = run.facts.get("parameters", {}).get("student")
        rows.append(
            [
                run.name,
                run.config.method,
                run.config.student,
                "" if size is None else f"{size:,}",
                "no labels" if math.isnan(run.score) else task.shown(run.score),
                wilson_of(classes).strip(),
                f"{classes['ece']:.3f}" if classes else "",
                f"{pair['after']:.2f}" if pair and pair["after"] is not None else "",
                f"{run.result['seconds']:.1f}",
            ]
        )
    name = f"test {words_of(task)}{', %' if task.larger else ''}"
    head = ("run", "method", "student", "parameters", name, "95 % interval", "ECE")
    return [
        page.table((*head, "R²", "seconds"), rows),
        page.paragraph(
            f"{SPREAD} A verdict about methods needs several seeds of each: "
            f"`hintjax distill --compare A B --seeds 3`.",
            "note",
        ),
    ]
