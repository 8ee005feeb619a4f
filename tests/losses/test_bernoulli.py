"""KD of sigmoids, against the formula in numpy and against KD of two classes."""

import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import binary_kd_loss, kd_loss

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]


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
    student, teacher = jnp.array(drawn(6, 1)), jnp.array(drawn(6, 1, seed=1))
    both = [jnp.concatenate([jnp.zeros((6, 1)), z], 1) for z in (student, teacher)]
    np.testing.assert_allclose(
        binary_kd_loss(student, teacher), kd_loss(*both), rtol=1e-4
    )
