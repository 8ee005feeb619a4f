"""The part of a report that shows a run class by class: confusions and calibration."""

from collections.abc import Mapping
from typing import Any

from hintjax.experiments.report import page
from hintjax.experiments.report.facts import SHOWN
from hintjax.experiments.report.page import Html
from hintjax.experiments.report.ran import Ran

_LISTED = 12  # confusions that are listed of many classes


def classes_of(run: Ran) -> list[Html]:
    """The confusion matrix, or the most frequent confusions, and the calibration."""
    classes = run.facts.get("classes")
    if not classes:
        return []
    names = dict(enumerate(map(str, run.result.get("class_names", ()))))
    found = [_calibration(classes)]
    if classes["complete"]:
        count = 1 + max(max(one[:2]) for one in classes["confusions"])
        count = min(SHOWN, max(count, run.result["classes"]))
        counts = [[0] * count for _ in range(count)]
        for true, guess, n in classes["confusions"]:
            counts[true][guess] = n
        shown = [names.get(i, str(i)) for i in range(count)]
        note = "Test examples by class (rows) and predicted class (columns)."
        return [page.matrix(shown, counts, note), *found]
    most = sorted(classes["confusions"], key=lambda one: -one[2])[:_LISTED]
    rows = [
        [names.get(true, true), names.get(guess, guess), n] for true, guess, n in most
    ]
    note = "The most frequent confusions among the test examples."
    return [page.table(("class", "predicted", "examples"), rows, note), *found]


def _calibration(classes: Mapping[str, Any]) -> Html:
    """The accuracy in each bin of the confidence."""
    rows, bins = [], classes["bins"]
    for number, (count, right, confidence) in enumerate(bins):
        if count:
            ends = f"{number / len(bins):.2f} to {(number + 1) / len(bins):.2f}"
            shown = (f"{100 * x / count:.1f} %" for x in (confidence, right))
            rows.append([ends, f"{count:.0f}", *shown])
    note = (
        f"Calibration: the expected calibration error (ECE) is {classes['ece']:.4f}, "
        f"the mean distance of confidence and accuracy."
    )
    head = ("confidence", "examples", "mean confidence", "accuracy")
    return page.folded("Calibration", page.table(head, rows, note))
