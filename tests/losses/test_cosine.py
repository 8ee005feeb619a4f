"""The cosine loss against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
cosine_loss = jax.jit(losses.cosine_loss)


def states(seed, shape=(3, 5, 6)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def formula(student, teacher):
    """Of one example: the mean over its tokens."""
    pairs = zip(student.reshape(-1, 6), teacher.reshape(-1, 6), strict=True)
    pairs = [(np.float64(s), np.float64(t)) for s, t in pairs]
    cosines = [s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in pairs]
    return 1 - np.mean(cosines)


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 2, 6)])
def test_loss_is_the_formula(shape):
    student, teacher = states(0, shape), states(1, shape)
    want = [formula(s, t) for s, t in zip(student, teacher, strict=True)]
    got = cosine_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with jax.enable_x64(True):
        arrays = (jnp.array(x, jnp.float64) for x in (student, teacher))
        np.testing.assert_allclose(cosine_loss(*arrays), want, rtol=1e-12)


def test_a_mask_covers_tokens():
    student, teacher = states(0), states(1)
    where = np.arange(5) < np.array([[5], [3], [0]])
    want = [
        formula(s[m], t[m])
        for s, t, m in zip(student, teacher, where, strict=True)
        if m.any()
    ]
    arrays = (
        jnp.array(np.where(where[..., None], x, np.nan)) for x in (student, teacher)
    )
    got = cosine_loss(*arrays, where=jnp.array(where))
    np.testing.assert_allclose(got, [*want, 0], rtol=1e-5)


def test_size_does_not_matter():
    student, teacher = states(0), states(1)
    want = cosine_loss(student, teacher)
    np.testing.assert_allclose(
        cosine_loss(student * np.float32(1e3), teacher * np.float32(1e-2)),
        want,
        rtol=1e-5,
    )
    np.testing.assert_allclose(cosine_loss(student, -student), 2, rtol=1e-6)


def test_a_vector_of_zeros_is_at_right_angles():
    student, teacher = jnp.zeros((1, 2, 4)), jnp.ones((1, 2, 4))
    loss = jax.value_and_grad(lambda s: cosine_loss(s, teacher).sum())
    value, gradient = jax.jit(loss)(student)
    assert value == 1
    assert np.abs(gradient).max() == 0


@pytest.mark.usefixtures("unchecked")
def test_a_number_alone_has_no_direction():
    with pytest.raises(ValueError, match="cosine_loss: .*at least 2 axes"):
        cosine_loss(jnp.zeros(3), jnp.zeros(3))
