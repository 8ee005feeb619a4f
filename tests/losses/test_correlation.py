"""CC against its formula and the benchmark's code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
correlation_loss = jax.jit(losses.correlation_loss)


def embeddings(seed, shape=(5, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def products(student, teacher):
    error = np.abs(np.float64(student) - np.float64(teacher))
    return np.array([(a * b).sum() for a, b in itertools.pairwise(error)])


def test_loss_is_the_formula():
    """Half of each product to each of its examples, and the mean exact."""
    student, teacher = embeddings(0), embeddings(1)
    e = products(student, teacher)
    want = [e[0], e[0] + e[1], e[1] + e[2], e[2] + e[3], e[3]]
    got = correlation_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, np.array(want) / 2 * 5 / 4, rtol=1e-5)
    np.testing.assert_allclose(np.mean(got), e.mean(), rtol=1e-6)


def test_loss_matches_repdistiller(golden):
    case = golden("cc/rep")
    value_and_grad = jax.value_and_grad(lambda s, t: correlation_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_those_that_count_are_neighbors():
    where = np.array([False, True, False, True, True])
    student, teacher = embeddings(0), embeddings(1)
    got = np.asarray(correlation_loss(student, teacher, where=where))
    want = products(student[where], teacher[where]).mean()
    np.testing.assert_allclose(got.sum() / 3, want, rtol=1e-5)
    np.testing.assert_array_equal(got[~where], 0)


def test_a_batch_of_one_has_no_neighbor():
    gradient = jax.jit(jax.value_and_grad(lambda s, t: correlation_loss(s, t).sum()))
    value, by_student = gradient(jnp.ones((1, 3)), jnp.zeros((1, 3)))
    assert value == np.abs(by_student).max() == 0


def test_an_exact_example_costs_nothing_and_pulls_nothing():
    """The slope of |x| at 0 is 0, as in torch; JAX has 1."""
    teacher = jnp.array(embeddings(1))
    student = embeddings(0)
    student[2] = embeddings(1)[2]
    gradient = jax.jit(jax.grad(lambda s: correlation_loss(s, teacher).sum()))
    np.testing.assert_array_equal(np.asarray(gradient(student))[2], 0)
