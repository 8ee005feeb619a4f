"""MiniLM's relations against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
attention_distribution_loss = jax.jit(losses.attention_distribution_loss)
relation_loss = jax.jit(losses.relation_loss, static_argnames="heads")
token_gram_loss = jax.jit(losses.token_gram_loss)

TOKENS = np.arange(5) < np.array([[5], [3], [1]])  # True where a token counts


def states(seed, shape=(3, 5, 12)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distributions(tokens, heads):
    """Of one example: how each token attends to the others, in each relation head."""
    for part in np.split(np.float64(tokens), heads, axis=-1):
        for query in part:
            e = np.exp([query @ key / np.sqrt(part.shape[-1]) for key in part])
            yield e / e.sum()


def formula(student, teacher, heads):
    pairs = zip(
        distributions(student, heads), distributions(teacher, heads), strict=True
    )
    return np.mean([(p * np.log(p / q)).sum() for q, p in pairs])


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_loss_is_the_formula(heads):
    student, teacher = states(0), states(1, (3, 5, 18))
    want = [formula(s, t, heads) for s, t in zip(student, teacher, strict=True)]
    got = relation_loss(jnp.array(student), jnp.array(teacher), heads=heads)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_float64_is_the_formula_to_rounding():
    student, teacher = states(0), states(1, (3, 5, 18))
    want = [formula(s, t, 3) for s, t in zip(student, teacher, strict=True)]
    with jax.enable_x64(True):
        arrays = (jnp.array(x, jnp.float64) for x in (student, teacher))
        got = relation_loss(*arrays, heads=3)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_padding_is_neither_query_nor_key():
    student, teacher = states(0), states(1, (3, 5, 18))
    want = [
        formula(s[:n], t[:n], 3)
        for s, t, n in zip(student, teacher, TOKENS.sum(1), strict=True)
    ]
    arrays = [
        jnp.array(np.where(TOKENS[..., None], x, np.nan)) for x in (student, teacher)
    ]

    def loss(*arrays):
        values = relation_loss(*arrays, heads=3, where=jnp.array(TOKENS))
        return values.sum(), values

    gradients, got = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    for x in map(np.asarray, gradients):
        assert np.isfinite(x).all()
        assert np.abs(x[~TOKENS]).max() == 0
        assert np.abs(x[:2][TOKENS[:2]]).min() > 0


def test_it_is_the_divergence_of_the_scores():
    """MiniLM's attention compares queries with keys; a relation, one with itself."""
    student, teacher = states(0), states(1)
    scores = (
        (x @ x.swapaxes(-1, -2))[:, None] / np.float32(12) ** 0.5
        for x in (student, teacher)
    )
    want = attention_distribution_loss(*scores)
    got = relation_loss(student, teacher, heads=1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_single_token_has_no_signal():
    student, teacher = states(0)[:, :1], jnp.array(states(1)[:, :1])
    loss = jax.value_and_grad(lambda s: relation_loss(s, teacher, heads=2).sum())
    value, gradient = jax.jit(loss)(student)
    assert value == np.abs(gradient).max() == 0


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused():
    student, teacher = jnp.zeros((2, 5, 12)), jnp.zeros((2, 5, 18))
    with pytest.raises(ValueError, match="heads to divide the width of the teacher"):
        relation_loss(student, teacher, heads=4)
    with pytest.raises(ValueError, match="relation_loss: expected heads to be an int"):
        relation_loss(student, teacher, heads=0)
    with pytest.raises(
        ValueError, match=r"student \(2, 5, 12\) and teacher \(2, 4, 18"
    ):
        relation_loss(student, teacher[:, :4], heads=2)
    with pytest.raises(ValueError, match=r"bool \(2,\) or \(2, 5\), got"):
        relation_loss(student, teacher, heads=2, where=jnp.ones((2, 4), bool))


def test_gram_matrices_are_the_formula():
    generator = np.random.default_rng(0)
    student = generator.normal(size=(3, 5, 4)).astype(np.float32)
    teacher = generator.normal(size=(3, 5, 7)).astype(np.float32)
    lengths = 5, 2, 0
    where = np.arange(5) < np.array(lengths)[:, None]

    def formula(s, t):
        return np.square(s @ s.T / 4 - t @ t.T / 7).mean() if len(s) else 0

    pairs = zip(student, teacher, lengths, strict=True)
    want = [formula(s[:n], t[:n]) for s, t, n in pairs]
    arrays = jnp.array(student), jnp.array(teacher)
    got = token_gram_loss(*arrays, where=jnp.array(where))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    want = [formula(s, t) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(token_gram_loss(*arrays), want, rtol=1e-5)
    some = token_gram_loss(*arrays, where=jnp.array([True, False, True]))
    np.testing.assert_allclose(some, [want[0], 0, want[2]], rtol=1e-5)


def test_gram_matrices_do_not_see_a_rotation_of_the_channels():
    generator = np.random.default_rng(0)
    teacher = generator.normal(size=(2, 5, 4))
    rotation, _ = np.linalg.qr(generator.normal(size=(4, 4)))
    arrays = jnp.array(teacher @ rotation, jnp.float32), jnp.array(teacher, jnp.float32)
    np.testing.assert_allclose(token_gram_loss(*arrays), 0, atol=1e-6)


def test_gram_matrices_of_other_tokens_are_refused(unchecked):
    with pytest.raises(
        ValueError, match=r"token_gram_loss: .*\(2, 5, 4\).*\(2, 6, 4\)"
    ):
        token_gram_loss(jnp.ones((2, 5, 4)), jnp.ones((2, 6, 4)))
