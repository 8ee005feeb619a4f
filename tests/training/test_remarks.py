"""Warnings that save a day: said once, kept in a file, and each says what to do."""

import pytest

from hintjax.training.remarks import (
    Stillness,
    kept,
    lopsided,
    read_remarks,
    remark,
    still,
)

pytestmark = pytest.mark.quick


def reports(*values, weight=1.0, name="hint"):
    return [{name: v, f"{name}/weighted": weight * v, "loss": v} for v in values]


def test_a_remark_is_said_once_and_kept(tmp_path, capsys):
    remark(tmp_path, ["one\nline", "another"])
    remark(tmp_path, ["another", "one line", "new"])
    said = capsys.readouterr().err.splitlines()
    assert said == [f"hintjax: warning: {w}" for w in ("one line", "another", "new")]
    assert read_remarks(tmp_path) == ["one line", "another", "new"]
    assert kept(tmp_path, ["new"]) == []


def test_no_remark_leaves_no_file(tmp_path):
    remark(tmp_path, [])
    assert not list(tmp_path.iterdir()) and read_remarks(tmp_path) == []


def test_a_term_that_does_not_move_is_told():
    (said,) = still(reports(0.70001, 0.7, 0.70002))
    assert said.startswith("The loss of the term 'hint' stays at 0.7 over the first 3")
    assert "raise its weight" in said


@pytest.mark.parametrize(
    "lines",
    [
        reports(0.7, 0.69, 0.71),  # it moves
        reports(0.0, 0.0, 0.0),  # the first report tells it
        reports(0.7, 0.7, 0.7, weight=0.0),  # nobody trains it
        reports(0.7, float("nan"), 0.7),
        [{"loss": 0.7}, {"loss": 0.7}],  # no term
    ],
)
def test_other_terms_are_left_alone(lines):
    assert still(lines) == []


def test_a_number_that_was_not_finite_is_no_reason_to_fail():
    lines = reports(0.7, 0.7)
    lines[1] = {"hint": None, "hint/weighted": None, "loss": None}
    assert still(lines) == []


def test_stillness_is_told_at_the_fifth_report_of_a_phase_also_after_a_resume():
    lines = reports(*[0.7] * 6)
    seen = Stillness([{**line, "stage": "a"} for line in lines[:3]])
    assert seen.see("b", lines[0]) == [] == seen.see("a", lines[3])
    assert len(seen.see("a", lines[4])) == 1
    assert seen.see("a", lines[5]) == []
    ended = Stillness([{**line, "stage": "a"} for line in lines])
    assert ended.see("a", lines[0]) == []


def terms(**shared):
    return {"terms": {name: {"shared": value} for name, value in shared.items()}}


def test_a_gradient_of_100_times_the_task_is_told():
    (said,) = lopsided(terms(task=0.5, hint=60.0, kd=1.0))
    assert "'hint' is 120 times as long as that of the task" in said
    assert "Lower its weight" in said and "--balance" in said


@pytest.mark.parametrize(
    "shared",
    [
        {"task": 0.5, "hint": 40.0},
        {"task": 0.0, "hint": 1.0},  # told elsewhere
        {"loss": 1.0},
        {"task": 0.5, "hint": float("nan")},
    ],
)
def test_other_gradients_are_left_alone(shared):
    assert lopsided(terms(**shared)) == []
