import numpy as np
import pytest

from hintjax.experiments.report import facts

pytestmark = pytest.mark.quick


def test_confusions_and_calibration_are_counted():
    label = np.array([0, 0, 1, 1, 2])
    guess = np.array([0, 1, 1, 1, 0])
    confidence = np.array([1.0, 0.5, 0.9, 0.7, 0.01])
    found = facts._counted(label, guess, confidence)
    assert found["confusions"] == [[0, 0, 1], [0, 1, 1], [1, 1, 2], [2, 0, 1]]
    assert found["complete"] and (found["right"], found["examples"]) == (3, 5)
    filled = [at for at, (count, _, _) in enumerate(found["bins"]) if count]
    assert filled == [0, 7, 10, 13, 14]  # of 15: ends belong to the bin below
    gaps = abs(np.array([1, 0, 1, 1, 0]) - confidence)
    np.testing.assert_allclose(found["ece"], gaps.mean())


def test_of_many_classes_only_the_most_frequent_confusions_are_kept():
    label = np.arange(400) % 200
    guess = np.where(label < 150, label + 1, label)
    found = facts._counted(label, guess, np.full(400, 0.5))
    assert not found["complete"]
    assert len(found["confusions"]) == facts._CONFUSIONS
    assert all(true != wrong for true, wrong, _ in found["confusions"])
    assert found["right"] == 100
