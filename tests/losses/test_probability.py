"""PKT against its formula and the field's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
probability_loss = jax.jit(losses.probability_loss)
slopes = jax.jit(jax.grad(lambda s, t: losses.probability_loss(s, t).sum()))


def embeddings(seed, shape=(5, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def formula_neighbors(rows):
    rows = np.float64(rows)
    rows = np.array([row / (np.sqrt((row**2).sum()) + 1e-7) for row in rows])
    similarity = np.array([[((a * b).sum() + 1) / 2 for b in rows] for a in rows])
    return np.array([row / row.sum() for row in similarity])


@pytest.mark.parametrize("zero", [False, True])
def test_loss_is_the_formula(zero):
    student, teacher = embeddings(0), embeddings(1, (5, 3))
    student[2] *= not zero
    q, p = formula_neighbors(student), formula_neighbors(teacher)
    want = (p * np.log((p + 1e-7) / (q + 1e-7))).mean(1)
    got = probability_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_loss_matches_repdistiller(golden):
    case = golden("pkt/rep")
    value_and_grad = jax.value_and_grad(lambda s, t: probability_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_near_and_opposite_similarities_are_the_formula():
    """Where differences of logarithms cancel, and where a probability is 0."""
    near = embeddings(0) + np.float32(1e-2) * embeddings(1)
    opposite = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1]], np.float32)
    for student, teacher, rtol in (
        (near, embeddings(0), 2e-4),
        (opposite, near, 1e-2),  # 1 - 1 in float32 is not 0, but near 1e-7
        (near, opposite, 2e-4),
    ):
        q, p = formula_neighbors(student), formula_neighbors(teacher)
        want = (p * np.log((p + 1e-7) / (q + 1e-7))).mean(1)
        got = probability_loss(jnp.array(student), jnp.array(teacher))
        np.testing.assert_allclose(got, want, rtol=rtol)


def test_the_scale_of_an_example_does_not_matter():
    student, teacher = embeddings(0), embeddings(1)
    scale = np.float32([0.1, 1, 10, 100, 1000])[:, None]
    want = probability_loss(student, teacher)
    np.testing.assert_allclose(probability_loss(student * scale, teacher), want, 1e-3)


def test_a_batch_of_one_has_no_neighbors():
    one = np.ones((1, 4), np.float32)
    assert np.all(probability_loss(one[:, :3], -one) == 0)


@pytest.mark.parametrize("size", [0, 1e-20, 1e-8])
def test_an_example_of_next_to_nothing_is_left_alone(size):
    student = embeddings(0)
    student[2] *= np.float32(size)
    got = np.asarray(slopes(student, embeddings(1)))
    assert np.abs(got[2]).max() == 0
    assert 0 < np.abs(got).max() < 1
