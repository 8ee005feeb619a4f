"""Similarities to a queue and between positions, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
queue_similarity_loss = jax.jit(
    losses.queue_similarity_loss, static_argnames="temperature"
)
position_similarity_loss = jax.jit(losses.position_similarity_loss)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def divergences(s, t, of_student, of_teacher, temperature):
    """KL of the softmax over the cosines to other rows, for each row."""

    def spread(x, others):
        x, others = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (x, others))
        scores = np.exp(x @ others.T / temperature)
        return scores / scores.sum(-1, keepdims=True)

    p, q = spread(t, of_teacher), spread(s, of_student)
    return (p * np.log(p / q)).sum(-1)


def test_the_loss_of_a_queue_is_the_formula():
    s, t, queue = rows(4, 6), rows(4, 6, seed=1), rows(5, 6, seed=2)
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    want = divergences(s, t, queue, queue, 0.2)
    with jax.enable_x64(True):
        got = queue_similarity_loss(*map(jnp.array, (s, t, queue)), temperature=0.2)
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_the_loss_between_positions_is_the_formula_and_may_be_masked():
    s, t = rows(3, 2, 4, 5), rows(3, 2, 4, 6, seed=1)
    where = np.ones((3, 2, 4), bool)
    where[1, 1, 1:], where[2] = False, False
    want = []
    for one, other, valid in zip(s, t, where, strict=True):
        a, b = one[valid], other[valid]
        want.append(divergences(a, b, a, b, 0.07).mean() if valid.any() else 0)
    with jax.enable_x64(True):
        hidden = (jnp.array(np.where(where[..., None], x, np.nan)) for x in (s, t))
        got = position_similarity_loss(*hidden, where=jnp.array(where))
        np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_a_queue_has_the_width_of_the_embeddings():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"queue to be \(k, 3\), got \(4, 2\)"):
        losses.queue_similarity_loss(x, x, jnp.ones((4, 2)))
