"""RKD against its formula and the field's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
angle_loss, distance_loss = map(jax.jit, (losses.angle_loss, losses.distance_loss))


def embeddings(seed, shape=(5, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def smooth(x):
    return x**2 / 2 if abs(x) < 1 else abs(x) - 0.5


def formula_distances(rows):
    rows = np.float64(rows)
    distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows])
    return distance / distance[distance > 0].mean()


def cosine(a, b):
    sizes = np.sqrt((a**2).sum() * (b**2).sum())
    return (a * b).sum() / sizes if sizes > 0 else 0.0


def formula_angles(rows):
    rows = np.float64(rows)
    return np.array(
        [[[cosine(j - i, k - i) for k in rows] for j in rows] for i in rows]
    )


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_distance_is_the_formula(spread):
    """The farther outlier reaches the linear part of the smooth L1 norm."""
    student, teacher = embeddings(0), embeddings(1, (5, 3))
    student[0] *= spread
    difference = formula_distances(student) - formula_distances(teacher)
    want = np.vectorize(smooth)(difference).mean(1)
    got = distance_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_angle_is_the_formula():
    student, teacher = embeddings(0), embeddings(1, (5, 3))
    difference = formula_angles(student) - formula_angles(teacher)
    assert (np.abs(difference) > 1).any()
    got = angle_loss(jnp.array(student), jnp.array(teacher))
    want = np.vectorize(smooth)(difference).mean((1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_both_match_repdistiller(golden):
    case = golden("rkd/rep")

    def total(student, teacher):
        distance = distance_loss(student, teacher).mean()
        return 25 * distance + 50 * angle_loss(student, teacher).mean()

    value, gradient = jax.jit(jax.value_and_grad(total))(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_position_and_scale_do_not_matter(loss):
    student, teacher = embeddings(0), embeddings(1)
    want = loss(student, teacher)
    np.testing.assert_allclose(loss(student * 8 + 2, teacher - 1), want, rtol=1e-3)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_a_batch_of_one_has_no_relation(loss):
    gradient = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum()))
    value, by_student = gradient(jnp.ones((1, 3)), jnp.ones((1, 4)))
    assert value == np.abs(by_student).max() == 0


def test_duplicates_are_a_distance_like_any_other():
    """All equal: at equal distances, as in the code; the mean counts them."""
    same, teacher = np.ones((4, 3), np.float32), np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(distance_loss(same, teacher), 0, atol=1e-6)
    pairs = jnp.array([[0.0], [0.0], [1.0]])
    want = (
        formula_distances(np.eye(3)) - np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0]]) * 1.5
    )
    got = distance_loss(pairs, np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(got, np.vectorize(smooth)(want).mean(1), rtol=1e-5)


def test_near_duplicates_are_measured_exactly():
    """A Gram matrix in float32 would lose this distance altogether."""
    student = 100 + embeddings(0) * np.float32(1e-2)
    want = formula_distances(student) - formula_distances(embeddings(1))
    got = distance_loss(jnp.array(student), jnp.array(embeddings(1)))
    np.testing.assert_allclose(got, np.vectorize(smooth)(want).mean(1), rtol=1e-4)
