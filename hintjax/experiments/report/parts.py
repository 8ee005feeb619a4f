"""The parts that all reports have: warnings, options, and the metric against size."""

import dataclasses
from pathlib import Path

from hintjax.experiments.config import Config
from hintjax.experiments.report import page
from hintjax.experiments.report.drawn import drawn
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.words import option_of, words_of
from hintjax.experiments.tasks import Task
from hintjax.training.remarks import read_remarks

Points = dict[str, tuple[float | int, float | int]]


def warnings_of(run_dir: Path, name: str = "") -> Html:
    """The warnings of a run."""
    found = read_remarks(run_dir)
    title = f"Warnings of {name}" if name else "Warnings"
    return page.section(title, page.points(found, "doubt"))


def configuration(config: Config) -> Html:
    """All options; those that are not the default come first, unfolded."""
    changed, usual = {}, {}
    for field in dataclasses.fields(Config):
        place = usual if getattr(config, field.name) == field.default else changed
        place[field.name] = option_of(config, field.name)
    return page.joined(
        page.values(changed),
        page.folded("Options with their default", page.values(usual)),
    )


def against_size(task: Task, points: Points) -> Html:
    """The picture of the metric against the number of parameters."""
    if not points:
        return Html("")
    words = f"Test {words_of(task)} against the number of parameters."
    how = {"metric": words_of(task), "percent": task.larger}
    return page.pictures(*drawn(words, lambda draw: draw.sizes(points, **how)))
