"""Candidates of a tuning: how they are written, drawn, and halved."""

import numpy as np
import pytest

from hintjax.experiments.tuning.candidates import candidates, parse_over, rungs, text_of

pytestmark = pytest.mark.quick


def test_listed_values_are_tried_in_all_combinations():
    overs = [parse_over("weight=1,10,10"), parse_over("pairs=a=b,a=b+c=d")]
    assert [text_of(one) for one in candidates(overs, 3, seed=0)] == [
        *("weight=1 pairs=a=b", "weight=1 pairs=a=b+c=d"),
        *("weight=10 pairs=a=b", "weight=10 pairs=a=b+c=d"),
    ]


def test_a_range_is_drawn_evenly_in_the_logarithm():
    overs = [parse_over("weight=1e-4..1e4"), parse_over("temperature=2,4")]
    drawn = candidates(overs, 8, seed=3)
    weights = sorted(one["weight"] for one in drawn)
    assert [int(np.floor(np.log10(weight))) for weight in weights] == [*range(-4, 4)]
    assert sorted(one["temperature"] for one in drawn) == [2.0] * 4 + [4.0] * 4
    assert drawn == candidates(overs, 8, seed=3) != candidates(overs, 8, seed=4)
    assert all(float(f"{weight:.3g}") == weight for weight in weights)


@pytest.mark.parametrize(
    ("number", "epochs", "most", "expected"),
    [
        (16, 64, None, [(16, 4), (8, 8), (4, 16), (2, 32), (1, 64)]),
        (9, 9, None, [(9, 2), (4, 3), (2, 5), (1, 9)]),
        (100, 2, None, [(100, 1), (50, 2)]),
        (6, 9, 1, [(6, 9)]),
        (1, 9, None, [(1, 9)]),
    ],
)
def test_each_rung_has_half_of_the_candidates_and_twice_the_epochs(
    number, epochs, most, expected
):
    found = rungs(number, epochs, most)
    assert [(rung.candidates, rung.epochs(epochs)) for rung in found] == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("weight", "expected name=value,value or name=lowest..highest, got 'weight'"),
        ("wieght=1", "expected the name of a setting, got 'wieght'. Nearest: weight"),
        ("weight=1,heavy", "expected weight to be float, got 'heavy'"),
        ("weight=0..10", "from a number > 0 to a larger number, got '0..10'. List a 0"),
        ("weight=10..1", "expected a range of weight from a number > 0"),
        ("hint_epochs=1..4", "expected no range of hint_epochs, got '1..4'. List its"),
        ("pairs=ab", "config: expected pairs as guided=hint, got 'ab'"),
    ],
)
def test_settings_that_cannot_be_tried_are_refused(text, sentence):
    with pytest.raises(ValueError, match="^[a-z]+: expected") as refused:
        parse_over(text)
    assert sentence in str(refused.value)


def test_a_setting_has_its_values_once():
    overs = [parse_over("weight=1"), parse_over("weight=2")]
    with pytest.raises(ValueError, match="tune: expected each name once"):
        candidates(overs, 1, seed=0)
