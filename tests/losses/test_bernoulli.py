"""KD of sigmoids, against the formula in numpy and against KD of two classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
binary_kd_loss, kd_loss = (
    jax.jit(loss, static_argnames="temperature")
    for loss in (losses.binary_kd_loss, losses.kd_loss)
)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_formula(temperature):
    student, teacher = drawn(5, 4), 3 * drawn(5, 4, seed=1)
    q, p = (1 / (1 + np.exp(-np.float64(z) / temperature)) for z in (student, teacher))
    per_class = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    want = temperature**2 * per_class.sum(-1)
    values = binary_kd_loss(
        jnp.array(student), jnp.array(teacher), temperature=temperature
    )
    np.testing.assert_allclose(values, want, rtol=1e-5)


def test_one_logit_is_kd_of_two_classes():
    student, teacher = drawn(6, 1), drawn(6, 1, seed=1)
    both = [np.hstack([np.zeros_like(z), z]) for z in (student, teacher)]
    np.testing.assert_allclose(
        binary_kd_loss(student, teacher), kd_loss(*both), rtol=1e-4
    )
