"""The forms of KD for tasks other than classification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax.losses import kd_loss
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

CONTEXT = hj.Context(jax.random.key(0), jnp.int32(0), True)


def drawn(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def applied(method, student, teacher, **batch):
    shown = Features(output=student), Features(output=teacher)
    return method.apply({}, {}, *shown, batch, CONTEXT)[0]


def test_dense_kd_is_the_mean_over_the_positions_that_are_not_ignored():
    student, teacher = drawn(3, 4, 4, 5), drawn(3, 4, 4, 5, seed=1)
    label = jnp.zeros((3, 4, 4), jnp.int32).at[0, 1:].set(255).at[2].set(255)
    values = applied(hj.dense_kd(2.0, ignore=255), student, teacher, label=label)
    each = kd_loss(student, teacher, temperature=2.0, batch_dims=3)
    want = [each[0, 0].mean(), each[1].mean(), 0]
    np.testing.assert_allclose(values, want, rtol=1e-5)
    values = applied(hj.dense_kd(2.0), student, teacher)  # needs no labels
    np.testing.assert_allclose(values, each.mean((1, 2)), rtol=1e-5)


def test_dense_kd_names_the_labels_that_it_needs(unchecked):
    outputs = drawn(2, 4, 4, 5), drawn(2, 4, 4, 5)
    with pytest.raises(hj.Refusal, match="dense_kd: expected 'label' in the batch"):
        applied(hj.dense_kd(ignore=255), *outputs)
    with pytest.raises(hj.Refusal, match=r"the label 'y' to be integer \(2, 4, 4\)"):
        applied(hj.dense_kd(ignore=255, label="y"), *outputs, y=jnp.zeros(2, int))


def test_regression_kd_is_the_mean_squared_error():
    student, teacher = drawn(4, 3), drawn(4, 3, seed=1)
    want = np.square(student - teacher).mean(-1)
    values = applied(hj.regression_kd(), student, teacher)
    np.testing.assert_allclose(values, want, rtol=1e-6)


def test_an_objective_knows_the_labels_that_its_terms_leave_out():
    ignoring = hj.task(lambda y, t: y.mean(-1), ignore=(255, -1))
    method = hj.objective(task=ignoring, kd=hj.dense_kd(ignore=255), at=hj.kd())
    assert method.ignored == (255, -1)
