"""Logit standardization against its formula and the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
kd_loss = jax.jit(losses.kd_loss, static_argnames="temperature")
standardize_logits = jax.jit(losses.standardize_logits)


@functools.cache
def gradient(measure):
    return jax.jit(jax.grad(lambda z, *a: measure(standardize_logits(z), *a)))


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


def weighed(z, weights):
    return (z * weights).sum()


def squared(z):
    return jnp.square(z).sum()


@pytest.mark.parametrize("constant", [0.0, 0.3, 100.1, -7e4])
@pytest.mark.parametrize("classes", [1, 3, 10, 1000])
def test_constant_logits_are_zero_and_have_no_gradient(constant, classes):
    z = np.full((2, classes), constant, np.float32)
    slope = gradient(weighed)(z, logits(1, (2, classes)))
    np.testing.assert_array_equal(standardize_logits(z), 0)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8])
def test_tiny_logits_have_no_gradient(size):
    z = logits(0) * np.float32(size)
    assert np.isfinite(standardize_logits(z)).all()
    np.testing.assert_array_equal(gradient(squared)(z), 0)


def test_nan_stays_with_its_example():
    got = np.asarray(standardize_logits(jnp.array([[1.0, np.nan], [1.0, 2.0]])))
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_raised(dtype):
    z = logits(0).astype(jnp.dtype(dtype))
    got = standardize_logits(z)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, standardize_logits(np.float32(z)))
