"""The part of a report that shows the metrics of a run over its steps."""

import math
from collections.abc import Sequence
from typing import Any

from hintjax.experiments.report import page
from hintjax.experiments.report.drawn import drawn
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.ran import Lines, Ran
from hintjax.experiments.report.words import words_of

Curve = tuple[list[float | int], list[float | int]]
Curves = dict[str, Curve]


def curves_of(run: Ran) -> list[Html]:
    """The pictures of the metrics of a run."""
    lines, ends = run.lines, run.result["boundaries"][:-1]
    terms = list(
        dict.fromkeys(
            name.removesuffix("/weighted")
            for line in lines
            for name in line
            if name.endswith("/weighted") and not name.startswith("validation/")
        )
    )
    groups: dict[str, tuple[Curves, bool]] = {
        "Each term, before its weight": (_series(lines, terms), True),
        "Each term, after its weight": (
            _series(lines, [*(f"{name}/weighted" for name in terms), "loss"]),
            True,
        ),
        "Validation: each term, before its weight": (
            _series(lines, [f"validation/{name}" for name in (*terms, "loss")]),
            True,
        ),
        f"{words_of(run.task).capitalize()}": (_measured(run), False),
        "R² of the regressors": (_series(lines, _named(lines, "/r2")), False),
        "Weights of the terms": (_series(lines, _named(lines, "/weight")), False),
    }
    found = []
    for title, (series, logarithmic) in groups.items():
        if not series:
            continue

        def draw(pictures: Any, title=title, series=series, log=logarithmic) -> Any:
            how = {"title": title, "boundaries": ends, "logarithmic": log}
            return pictures.curves(series, **how)

        found += drawn(f"{title}: {', '.join(series)}, over the steps.", draw)
    return [page.pictures(*found)] if found else []


def validated(run: Ran) -> Curve | None:
    """The metric of the task in validation."""
    series = _measured(run)
    found = [curve for name, curve in series.items() if name.startswith("validation/")]
    return found[-1] if found else None


def _series(lines: Lines, names: Sequence[str]) -> Curves:
    """The values of metrics over the steps, by name, where they were reported.

    A nan stands between two phases, so that no line is drawn from one to the other.
    """
    found: Curves = {}
    for name in names:
        at, values, phase = [], [], None
        for line in lines:
            if name not in line:
                continue
            if phase not in (None, line["stage"]):
                at.append(line["step"])
                values.append(math.nan)
            phase, value = line["stage"], line[name]
            at.append(line["step"])
            values.append(math.nan if value is None else value)
        if at:
            found[name] = (at, values)
    return found


def _named(lines: Lines, end: str) -> list[str]:
    """The metrics whose names end so, without those of the validation."""
    names = dict.fromkeys(name for line in lines for name in line)
    return [
        name
        for name in names
        if name.endswith(end) and not name.startswith("validation/")
    ]


def _measured(run: Ran) -> Curves:
    """The metric of the task in training and validation."""
    names = dict.fromkeys(name for line in run.lines for name in line)
    ends = [name for name in names if name.endswith(f"/{run.task.name}")]
    return _series(run.lines, ends)
