import pytest

pytest.importorskip("matplotlib")

from hintjax.experiments import pictures
from hintjax.experiments.pictures import Tried

pytestmark = pytest.mark.quick


def test_tried_settings_are_filled_if_they_were_trained_to_the_end():
    points = {
        "AT": [Tried(10.0, 0.5, True), Tried(1000.0, 0.4, False)],
        "KD": [Tried(0.5, 0.45, True)],
    }
    (axes,) = pictures.tried(points, xlabel="weight", metric="accuracy").axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "weight"
    found = [
        (line.get_xdata()[0], line.get_markerfacecolor() != "white")
        for line in axes.lines
        if len(line.get_xdata())
    ]
    assert found == [(1000.0, False), (10.0, True), (0.5, True)]


def test_a_value_of_0_has_a_place_on_the_axis():
    zero = {"AT": [Tried(0.0, 0.5, True), Tried(2.0, 0.4, True)]}
    (axes,) = pictures.tried(zero, xlabel="weight", metric="accuracy").axes
    assert axes.get_xscale() == "symlog"
