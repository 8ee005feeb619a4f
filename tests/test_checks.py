"""Error messages: where, wanted, got, do."""

import jax
import jax.numpy as jnp
import pytest

from hintjax import _checks

pytestmark = pytest.mark.quick


def test_a_message_is_one_sentence_and_what_to_do():
    got = _checks.message("loss", "a", "b", "Do c.")
    assert got == "loss: expected a, got b. Do c."
    assert _checks.message("loss", "a", "b") == "loss: expected a, got b."


def test_same_shape_names_all_shapes():
    one, other = jnp.zeros((2, 3)), jnp.zeros((2, 1))
    _checks.same_shape("loss", student=one, teacher=one)
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 1\)"):
        _checks.same_shape("loss", student=one, teacher=other)


def test_same_leading_looks_past_the_last_axes():
    one, other = jnp.zeros((2, 4, 3)), jnp.zeros((2, 5, 7))
    _checks.same_leading("loss", 2, student=one, teacher=other)
    with pytest.raises(
        ValueError, match=r"student \(2, 4, 3\) and teacher \(2, 5, 7\)"
    ):
        _checks.same_leading("loss", 1, student=one, teacher=other)


def test_rank_names_the_layout():
    with pytest.raises(ValueError, match=r"x to have at least 3 axes \(h w c\), got"):
        _checks.rank("loss", 3, "h w c", x=jnp.zeros((2, 3)))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_positive(value):
    with pytest.raises(ValueError, match=f"loss: expected T to be > 0, got {value}"):
        _checks.positive("loss", T=value)


def test_positive_lets_traced_numbers_through():
    def f(value):
        _checks.positive("loss", T=value)
        return value

    assert jax.jit(f)(-1.0) == -1


@pytest.mark.parametrize("value", [0, 1.0, "2"])
def test_positive_int(unchecked, value):
    with pytest.raises(ValueError, match="n to be an integer >= 1, got"):
        _checks.positive_int("loss", n=value)


def test_nearest_is_best_first_and_never_empty():
    names = ["stem", "group1/block0", "group2/block0", "head"]
    assert _checks.nearest("group2/blok0", names)[0] == "group2/block0"
    assert len(_checks.nearest("?", names)) == 3
    assert _checks.nearest("?", []) == []
