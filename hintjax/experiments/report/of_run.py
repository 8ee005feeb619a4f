"""The report of one run."""

import math

from hintjax.experiments.report import page
from hintjax.experiments.report.attention import ATTENTION
from hintjax.experiments.report.classes import classes_of
from hintjax.experiments.report.curves import curves_of
from hintjax.experiments.report.drawn import from_file, without_pictures
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.parts import (
    Points,
    against_size,
    configuration,
    warnings_of,
)
from hintjax.experiments.report.ran import Ran
from hintjax.experiments.report.words import (
    SPREAD,
    counted,
    dataset_of,
    device_of,
    r2_of,
    shown,
    sized,
    wilson_of,
    words_of,
)

_ATTENTION = (
    "Attention maps of the pair on test images. Red in the difference: the student "
    "looks more; blue: it looks less."
)


def run_page(run: Ran) -> str:
    """The report of one run."""
    config, task = run.config, run.task
    title = f"{config.method} on {dataset_of(config)}: {shown(task, run.score)}"
    return page.page(
        title,
        warnings_of(run.path),
        page.section("What was run", _what(run)),
        page.section("Results", _results(run)),
        page.section("Curves", *curves_of(run)),
        page.section("Classes", *classes_of(run)),
        page.section(
            "Attention maps", page.pictures(from_file(run.path / ATTENTION, _ATTENTION))
        ),
        page.section("Accuracy and size", against_size(task, _points(run)))
        if task.larger
        else Html(""),
        page.section("Configuration", configuration(config)),
        without_pictures(),
    )


def _what(run: Ran) -> Html:
    """The networks, their sizes, the pair, and the length of a run."""
    config, facts = run.config, run.facts
    sizes, pair = facts.get("parameters", {}), facts.get("pair")
    found: dict[str, object] = {
        "method": config.method,
        "dataset": counted(dataset_of(config), facts),
        "student": sized(config.student, sizes.get("student")),
    }
    if "teacher" in sizes:
        found["teacher"] = sized(config.teacher, sizes["teacher"])
        found["compression"] = f"{sizes['teacher'] / max(sizes['student'], 1):.1f} x"
    if pair:
        found["pair"] = f"{pair['guided']} = {pair['hint']}"
        found["R² of the pair"] = r2_of(pair)
    phases = list(dict.fromkeys(line["stage"] for line in run.lines))
    ends = run.result["boundaries"]
    found["phases"] = ", ".join(
        f"{name} up to step {end}" for name, end in zip(phases, ends, strict=False)
    )
    found["seed"] = config.seed
    found["time"] = f"{run.result['seconds']:.1f} s of training"
    spent = [f"{name} {s:.1f} s" for name, s in run.result.get("spent", {}).items()]
    found["beside training"] = ", ".join(spent)
    found |= device_of(facts.get("machine", {}))
    return page.values({name: words for name, words in found.items() if words != ""})


def _results(run: Ran) -> Html:
    """The metrics of a run at its end."""
    task, classes, teacher = (
        run.task,
        run.facts.get("classes"),
        run.facts.get("teacher"),
    )
    found: dict[str, object] = {
        f"test {words_of(task)}": f"{shown(task, run.score)}{wilson_of(classes)}",
        f"validation {words_of(task)}": shown(
            task, run.result.get(f"validation/{task.name}", math.nan)
        ),
    }
    if classes:
        found["calibration error (ECE)"] = f"{classes['ece']:.4f}"
    if teacher:
        right = teacher["right"] / max(teacher["examples"], 1)
        words = f"{shown(task, right)}{wilson_of(teacher)}, ECE {teacher['ece']:.4f}"
        found["test accuracy of the teacher"] = words
    others = {
        name: f"{value:.5g}"
        for name, value in run.result.items()
        if name.startswith("test/") and name != f"test/{task.name}"
    }
    return page.joined(
        page.values(found),
        page.paragraph(SPREAD, "note") if classes else Html(""),
        page.folded("All terms and metrics on the test split", page.values(others)),
    )


def _points(run: Ran) -> Points:
    """Parameters and accuracy of teacher and student."""
    sizes, teacher = run.facts.get("parameters", {}), run.facts.get("teacher")
    points = {}
    if teacher:
        right = teacher["right"] / max(teacher["examples"], 1)
        points["teacher"] = (sizes["teacher"], right)
    if sizes and not math.isnan(run.score):
        points["student"] = (sizes["student"], run.score)
    return points
