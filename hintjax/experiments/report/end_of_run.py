"""The end of a run: its facts, its picture of attention, and its report."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hintjax.experiments.attachment import middle
from hintjax.experiments.comparison import Arm
from hintjax.experiments.finished import DEPLOYED, load_student
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.report.attention import attention_picture
from hintjax.experiments.report.drawn import drawing
from hintjax.experiments.report.facts import Pair, classes_by, pair_of, write_facts
from hintjax.experiments.report.report import write_report
from hintjax.experiments.run import load_deployed
from hintjax.experiments.setting import Setting, taught_by
from hintjax.networks import Variables
from hintjax.processes import told


def report_run(
    setting: Setting,
    run_dir: Path,
    recipe: Recipe,
    teacher: Variables | None,
    pair: Pair | None,
) -> None:
    """Writes facts.json, attention.png and report.html of a finished run.

    Args:
        setting: setting of the run.
        run_dir: run directory.
        recipe: recipe of the run.
        teacher: variables of the teacher, if the run has one.
        pair: the pair whose R^2 is reported, if it was measured before the run.
    """
    network, variables = load_deployed(setting, run_dir, recipe)
    judged = classes_by(setting, network)(variables)
    taught, measured = None, None
    if teacher is not None and setting.places.same_outputs:
        taught = classes_by(setting, taught_by(setting))(teacher)
    pair = pair or pair_of(setting, teacher)
    if pair is not None:
        student = load_student(run_dir, hints_only=True)[1]
        measured = {"guided": pair.guided, "hint": pair.hint, "before": pair.before}
        measured["after"] = pair.explained(student)
    write_facts(setting, run_dir, teacher, judged, taught, measured)
    if pair is not None and teacher is not None and drawing():
        attention_picture(setting, run_dir, teacher, pair.guided, pair.hint)
    print(f"report: {written(run_dir)}")


def arm_facts(
    setting: Setting,
    run_dir: Path,
    arms: Sequence[Arm],
    teacher: Variables,
    found: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes facts.json of the runs that stand for the arms of a comparison.

    Args:
        setting: setting of the comparison.
        run_dir: its directory.
        arms: the arms.
        teacher: variables of the teacher.
        found: result of `compare`.
    """
    guided, hint = middle(setting.places)[-1]
    alone = classes_by(setting, setting.student)
    for arm in arms:
        runs = found[arm.name]["runs"]
        for run, after in zip(runs, found[arm.name]["r2"], strict=True):
            path = run_dir / run
            network, variables = load_deployed(setting, path, arm.recipe)
            shipped = told((path / DEPLOYED).exists)
            judge = classes_by(setting, network) if shipped else alone
            pair = {"guided": guided, "hint": hint, "before": None, "after": after}
            write_facts(setting, path, teacher, judge(variables), pair=pair)


def written(run_dir: Path) -> str:
    """Writes report.html in the first process, and returns its path."""
    return told(partial(_written, run_dir))


def _written(run_dir: Path) -> str:
    return str(write_report(run_dir))
