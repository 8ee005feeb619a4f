"""Warnings about a run that may save a day: each is said once, and kept in a file.

warnings.txt in the run directory has one sentence in each line. A report shows them.
The functions that judge numbers are pure: they return sentences.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hintjax.processes import first
from hintjax.stages import Report

FILE = "warnings.txt"
REPORTS = 5  # of a phase, from which on a term that does not move is told
STILL = 1e-4  # largest change of a term that does not move, as a part of the term
LOPSIDED = 100  # times the task's gradient, from which on a term is told
TASK = "task"  # the term of the labels, as the recipes of the command name it


def kept(run_dir: str | os.PathLike[str], sentences: Sequence[str]) -> list[str]:
    """Keeps sentences in warnings.txt, and returns those that were not there before.

    Of several processes only the first keeps and returns sentences.

    Args:
        run_dir: run directory.
        sentences: each says what was seen and what to do.
    """
    if not first() or not sentences:
        return []
    before = read_remarks(run_dir)
    flat = dict.fromkeys(" ".join(one.split()) for one in sentences)
    new = [one for one in flat if one not in before]
    if new:
        with (Path(run_dir) / FILE).open("a", encoding="utf-8") as file:
            file.writelines(f"{one}\n" for one in new)
    return new


def remark(run_dir: str | os.PathLike[str], sentences: Sequence[str]) -> None:
    """Says each sentence once in the life of a run, on stderr.

    Args:
        run_dir: run directory, which keeps the sentences.
        sentences: each says what was seen and what to do.
    """
    for sentence in kept(run_dir, sentences):
        print(f"hintjax: warning: {sentence}", file=sys.stderr)


def read_remarks(run_dir: str | os.PathLike[str]) -> list[str]:
    """Reads the warnings of a run, oldest first."""
    path = Path(run_dir) / FILE
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


class Stillness:
    """Sees the first reports of each phase, and tells the terms that do not move.

    Args:
        lines: lines of metrics.jsonl of the run so far.
    """

    def __init__(self, lines: Sequence[Mapping[str, Any]]):
        self._seen: dict[str, list[Mapping[str, Any]]] = {}
        for line in lines:
            self.see(line["stage"], line)

    def see(self, phase: str, metrics: Mapping[str, Any]) -> list[str]:
        """Takes the metrics of a report, and returns sentences if it is the last one.

        Args:
            phase: name of the phase.
            metrics: its metrics, on the host.
        """
        seen = self._seen.setdefault(phase, [])
        if len(seen) == REPORTS:
            return []
        seen.append(metrics)
        return still(seen) if len(seen) == REPORTS else []


def still(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each term whose loss does not move.

    Every report is of another batch, so even a term that learns slowly moves. A term of
    weight 0 is left alone, and so is a loss of exactly 0, which the first report tells.

    Args:
        reports: the metrics of several reports of one phase.

    >>> reports = [{"kd": 0.7, "kd/weighted": 0.7}] * 5
    >>> still(reports)[0][:52]
    "The loss of the term 'kd' stays at 0.7 over the firs"
    """
    said = []
    for name in [name for name in reports[0] if f"{name}/weighted" in reports[0]]:
        found, weighted = (
            [float(_or_nan(one.get(key))) for one in reports]
            for key in (name, f"{name}/weighted")
        )
        largest = max(map(abs, found))
        if not all(map(math.isfinite, found)) or largest == 0 or not any(weighted):
            continue
        if max(found) - min(found) <= STILL * largest:
            said.append(
                f"The loss of the term {name!r} stays at {found[-1]:.4g} over the "
                f"first {len(reports)} reports: it does not learn. Look for features "
                f"that do not depend on the input, raise its weight or the learning "
                f"rate, or choose other layers."
            )
    return said


def lopsided(report: Report) -> list[str]:
    """Returns a sentence for each term whose gradient drowns that of the task.

    Gradients are compared by the student's arrays that all terms move.

    Args:
        report: result of `Stage.report`.

    >>> terms = {"task": {"shared": 0.1}, "hint": {"shared": 50.0}}
    >>> lopsided({"terms": terms})[0][:61]
    "The gradient of the term 'hint' is 500 times as long as that "
    """
    terms = jax.device_get(report["terms"])
    task = terms.get(TASK, {}).get("shared", 0)
    said = []
    for name, term in terms.items():
        times = term["shared"] / task if task > 0 else 0.0
        if name == TASK or not times >= LOPSIDED:
            continue
        said.append(
            f"The gradient of the term {name!r} is {times:.0f} times as long as that "
            f"of the task, in the layers that both train: the labels teach these "
            f"layers next to nothing. Lower its weight, or let it be balanced "
            f"(--balance 0.5; hintjax.rebalanced)."
        )
    return said


def _or_nan(value: Any) -> Any:
    """The value of a metric; nan for a number that was not finite."""
    return math.nan if value is None else value
