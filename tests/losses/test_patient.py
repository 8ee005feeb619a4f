"""PKD against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
cosine_loss, patient_loss = map(jax.jit, (losses.cosine_loss, losses.patient_loss))


def states(seed, shape=(4, 6)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def formula(student, teacher):
    """The mean over the channels, vector by vector; the paper's sum over them."""
    student, teacher = np.float64(student), np.float64(teacher)
    units = student / np.linalg.norm(student), teacher / np.linalg.norm(teacher)
    return np.square(units[0] - units[1]).mean()


def test_loss_is_the_formula():
    student, teacher = states(0), states(1)
    want = [formula(s, t) for s, t in zip(student, teacher, strict=True)]
    got = patient_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with jax.enable_x64(True):
        arrays = (jnp.array(x, jnp.float64) for x in (student, teacher))
        np.testing.assert_allclose(patient_loss(*arrays), want, rtol=1e-12)


def test_it_is_the_cosine_in_another_measure():
    """||s - t||^2 = 2 (1 - cos) of unit vectors."""
    student, teacher = jnp.array(states(0)), jnp.array(states(1))
    want = 2 * np.asarray(cosine_loss(student, teacher)) / 6
    np.testing.assert_allclose(patient_loss(student, teacher), want, rtol=1e-5)


def test_many_vectors_at_once_are_one_each():
    student, teacher = states(0, (4, 3, 6)), states(1, (4, 3, 6))
    got = np.asarray(patient_loss(student, teacher))
    np.testing.assert_allclose(got[:, 1], patient_loss(student[:, 1], teacher[:, 1]))


def test_a_vector_of_zeros_has_no_gradient():
    student, teacher = jnp.zeros((1, 4)), jnp.ones((1, 4))
    loss = jax.value_and_grad(lambda s: patient_loss(s, teacher).sum())
    value, gradient = jax.jit(loss)(student)
    np.testing.assert_allclose(value, 0.25, rtol=1e-6)
    assert np.abs(gradient).max() == 0
