"""Logit standardization against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import kd_loss, standardize_logits

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]


def logits(seed, shape=(2, 3, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 3


def test_it_is_the_formula():
    z = np.float64(logits(0)) + 5
    centered = z - z.mean(-1, keepdims=True)
    want = centered / (1e-7 + np.sqrt((centered**2).sum(-1, keepdims=True) / 6))
    got = standardize_logits(jnp.array(logits(0) + 5))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_kd_of_it_matches_the_code(golden):
    case = golden("kd/logit_standardized_T2")

    def loss(student, teacher):
        student, teacher = standardize_logits(student), standardize_logits(teacher)
        return kd_loss(student, teacher, temperature=2.0).mean()

    arrays = case["in.logits_student"], case["in.logits_teacher"]
    value, gradient = jax.jit(jax.value_and_grad(loss))(*arrays)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.logits_student", gradient) < 1e-5


@pytest.mark.parametrize("constant", [0.0, 0.3, 100.1, -7e4])
@pytest.mark.parametrize("classes", [1, 3, 10, 1000])
def test_constant_logits_are_zero_and_have_no_gradient(constant, classes):
    z = jnp.full((2, classes), constant)
    weights = jnp.array(logits(1, (2, classes)))
    gradient = jax.jit(jax.grad(lambda z: (standardize_logits(z) * weights).sum()))
    np.testing.assert_array_equal(standardize_logits(z), 0)
    np.testing.assert_array_equal(gradient(z), 0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8])
def test_tiny_logits_have_no_gradient(size):
    z = jnp.array(logits(0)) * size
    gradient = jax.jit(jax.grad(lambda z: jnp.square(standardize_logits(z)).sum()))
    assert np.isfinite(standardize_logits(z)).all()
    np.testing.assert_array_equal(gradient(z), 0)


def test_nan_stays_with_its_example():
    got = standardize_logits(jnp.array([[1.0, jnp.nan], [1.0, 2.0]]))
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_raised(dtype):
    z = jnp.array(logits(0)).astype(dtype)
    got = standardize_logits(z)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, standardize_logits(z.astype(jnp.float32)))
