"""Several terms of which an example keeps some: the worst always, others by chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax.method import nothing

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]

LOSSES = {
    "a": jnp.array([1.0, 5.0, 2.0, 4.0]),
    "b": jnp.array([3.0, 1.0, 8.0, 0.5]),
    "c": jnp.array([2.0, 2.0, 2.0, 2.0]),
}


def given(name):
    """A method whose values are the output of the student, times constants."""

    def apply(params, memory, student, teacher, batch, context):
        return student.output * LOSSES[name], memory, {}

    return hj.Method(hj.Wants(output=True), hj.Wants(), nothing, apply)


def applied(keep, batch=None, *, train=True, key=0, scale=1.0, **weights):
    terms = {n: hj.weighted(given(n), weights.get(n, 1.0)) for n in LOSSES}
    method = hj.teacher_dropping(keep, **terms)
    params, memory = method.init(jax.random.key(0), hj.Features(), hj.Features(), None)
    context = hj.Context(jax.random.key(key), jnp.int32(0), train)
    student = hj.Features(output=jnp.full(4, scale))
    values, _, metrics = method.apply(
        params, memory, student, hj.Features(), batch or {}, context
    )
    return values, metrics


def test_without_chance_each_example_keeps_its_worst_term_alone():
    values, metrics = applied(0.0)
    np.testing.assert_allclose(values, [3, 5, 8, 4])
    assert metrics["loss"] == 5
    assert [float(metrics[f"{n}/kept"]) for n in LOSSES] == [0.5, 0.5, 0.0]


def test_the_worst_term_is_chosen_by_weighted_values():
    values, _ = applied(0.0, c=10.0)
    np.testing.assert_allclose(values, [20, 20, 20, 20])


@pytest.mark.parametrize("how", [{"keep": 1.0}, {"keep": 0.0, "train": False}])
def test_all_terms_count_with_probability_1_and_in_evaluation(how):
    _, metrics = applied(**how)
    assert metrics["loss"] == pytest.approx(float(np.mean([*LOSSES.values()])))


def test_the_loss_is_the_mean_over_all_terms_that_are_kept():
    for key in range(5):
        values, metrics = applied(0.5, key=key)
        kept = 4 * sum(float(metrics[f"{n}/kept"]) for n in LOSSES)
        assert 4 <= kept <= 12
        # Each value, times the kept terms per example, is a sum of some of the terms.
        sums = np.asarray(values) * kept / 4
        table = np.stack([*LOSSES.values()])
        for column, found in zip(table.T, sums, strict=True):
            subsets = [column @ np.array([i & 1, i >> 1 & 1, i >> 2]) for i in range(8)]
            assert np.isclose(subsets, found, atol=1e-5).any()
            assert found >= column.max() - 1e-5


def test_examples_that_are_not_valid_do_not_count():
    where = jnp.array([True, True, False, True])
    _, metrics = applied(0.0, {"where": where})
    assert metrics["loss"] == 4


def test_only_kept_terms_have_a_gradient():
    def loss(scale):
        return applied(0.0, scale=scale)[1]["loss"]

    assert jax.grad(loss)(1.0) == pytest.approx(5.0)


def test_a_value_that_is_not_a_number_is_never_dropped():
    values, _ = applied(0.0, scale=jnp.nan)
    assert np.isnan(values).all()


def test_a_probability_beyond_1_and_a_weight_of_0_are_refused():
    with pytest.raises(hj.Refusal, match=r"expected a keep in \[0, 1\]|in \[0, 1\]"):
        hj.teacher_dropping(1.5, a=given("a"))
    with pytest.raises(hj.Refusal, match="weights > 0.*weight 0 of 'a'"):
        hj.teacher_dropping(0.5, a=hj.weighted(given("a"), 0), b=given("b"))
