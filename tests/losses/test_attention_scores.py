"""TinyBERT's and MiniLM's losses of self-attention against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses
from hintjax.losses.attention_scores import over_keys

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
attention_distribution_loss = jax.jit(losses.attention_distribution_loss)
attention_score_loss = jax.jit(losses.attention_score_loss)
attention_score_loss_code = jax.jit(
    losses.attention_score_loss_code, static_argnames="floor"
)

SHAPE = (3, 2, 5, 5)
TOKENS = np.arange(5) < np.array([[5], [3], [1]])  # True where a token counts
BOTH = [attention_score_loss, attention_distribution_loss]


def scores(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def square(student, teacher):
    """Of one example: over heads, queries and keys."""
    return np.square(np.float64(student) - teacher).mean()


def divergence(student, teacher):
    """Of one example, query by query."""
    values = []
    for s, t in zip(
        student.reshape(-1, student.shape[-1]),
        teacher.reshape(-1, teacher.shape[-1]),
        strict=True,
    ):
        q, p = (np.exp(np.float64(x)) / np.exp(np.float64(x)).sum() for x in (s, t))
        values.append(sum(b * np.log(b / a) for a, b in zip(q, p, strict=True) if b))
    return np.mean(values)


FORMULA = dict(zip(BOTH, [square, divergence], strict=True))


@functools.cache
def gradient(loss):
    return jax.jit(jax.value_and_grad(lambda *a, **k: loss(*a, **k).sum(), (0, 1)))


@pytest.mark.parametrize("loss", BOTH)
def test_loss_is_the_formula(loss):
    student, teacher = scores(0), scores(1)
    want = [FORMULA[loss](s, t) for s, t in zip(student, teacher, strict=True)]
    got = loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("loss", BOTH)
def test_padding_is_neither_query_nor_key(loss):
    student, teacher = scores(0), scores(1)
    want = [
        FORMULA[loss](s[:, :n, :n], t[:, :n, :n])
        for s, t, n in zip(student, teacher, TOKENS.sum(1), strict=True)
    ]
    hidden = ~(TOKENS[:, None, :, None] & TOKENS[:, None, None, :])
    hidden = np.broadcast_to(hidden, SHAPE)
    arrays = [jnp.array(np.where(hidden, np.nan, x)) for x in (student, teacher)]
    where = jnp.array(TOKENS)
    np.testing.assert_allclose(loss(*arrays, where=where), want, rtol=1e-5, atol=1e-7)
    _, gradients = gradient(loss)(*arrays, where=where)
    for x in map(np.asarray, gradients):
        assert np.abs(x[hidden]).max() == 0
        assert np.isfinite(x).all()
        assert np.abs(x).max() > 0


@pytest.mark.parametrize("loss", [*BOTH, attention_score_loss_code])
def test_an_example_of_padding_is_0(loss):
    nothing = np.full((1, 2, 5, 5), np.nan, np.float32)
    value, gradients = gradient(loss)(nothing, nothing, where=np.zeros((1, 5), bool))
    assert value == max(np.abs(x).max() for x in gradients) == 0


def test_a_query_with_nothing_to_attend_to_attends_to_all():
    got = jax.jit(over_keys)(scores(0), np.zeros((3, 5), bool))
    np.testing.assert_allclose(got, np.full(SHAPE, -np.log(5)), rtol=1e-6)


@pytest.mark.parametrize("floor", [None, -1e-3, -2.0])
def test_code_is_the_formula(floor):
    student, teacher = scores(0) * 100, scores(1) * 100
    level = -100 if floor is None else floor
    want = [
        square(*(np.where(x > level, x, 0) for x in pair))
        for pair in zip(student, teacher, strict=True)
    ]
    hyper = {} if floor is None else {"floor": floor}
    got = attention_score_loss_code(jnp.array(student), jnp.array(teacher), **hyper)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_code_drops_what_a_network_hides_and_counts_it():
    student, teacher = scores(0), scores(1)
    for n in -1e4, -np.inf:
        arrays = [
            jnp.array(np.where(TOKENS[1], x, n), jnp.float32)
            for x in (student, teacher)
        ]
        got, gradients = gradient(attention_score_loss_code)(*arrays)
        shown = student[..., :3] - np.float64(teacher[..., :3])
        np.testing.assert_allclose(got, 3 * np.square(shown).mean() * 3 / 5, rtol=1e-5)
        assert np.abs(np.asarray(gradients[0])[..., 3:]).max() == 0


def test_code_matches_textbrewer(golden):
    case = golden("transformer/att_mse")

    def loss(student, teacher):
        return attention_score_loss_code(student, teacher, floor=-1e-3).mean()

    value, slope = jax.jit(jax.value_and_grad(loss))(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", slope) < 1e-5
    with jax.enable_x64(True):
        arrays = (np.float64(case.arrays[key]) for key in ("in.f_s", "in.f_t"))
        assert case.error("out.loss", jax.jit(loss)(*arrays)) < 1e-12


def test_the_sound_loss_is_not_textbrewers(golden):
    case = golden("transformer/att_mse")
    values = attention_score_loss(case["in.f_s"], case["in.f_t"])
    assert (
        case.error("out.loss", np.mean(values)) > 0.5
    )  # there half of the scores are dropped


def test_a_causal_mask_hides_keys_from_distributions():
    later = np.triu(np.ones((5, 5), bool), 1)
    student, teacher = (np.where(later, -np.inf, scores(i)) for i in (0, 1))
    want = [
        divergence(s, t) for s, t in zip(*map(finite, (student, teacher)), strict=True)
    ]
    arrays = [jnp.array(x, jnp.float32) for x in (student, teacher)]
    got = attention_distribution_loss(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    _, gradients = gradient(attention_distribution_loss)(*arrays)
    for x in map(np.asarray, gradients):
        assert np.isfinite(x).all()
        assert np.abs(x[..., later]).max() == 0


def finite(x):
    """-inf where numpy can go on: its exponential is 0 all the same."""
    return np.maximum(x, -1e4)


def test_distributions_do_not_mind_a_constant_on_a_query():
    student, teacher = scores(0), scores(1)
    shift = np.arange(5, dtype=np.float32)[None, None, :, None]
    want = attention_distribution_loss(student, teacher)
    got = attention_distribution_loss(student + shift, teacher)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_margins_of_120_are_bounded():
    student = np.zeros((1, 1, 2, 2), np.float32)
    student[..., 0] = 120
    value, gradients = gradient(attention_distribution_loss)(student, -student)
    np.testing.assert_allclose(value, 120, rtol=1e-6)
    assert np.abs(gradients[0]).max() <= 0.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [*BOTH, attention_score_loss_code])
def test_what_has_another_shape_is_refused(loss):
    name = loss.__name__
    with pytest.raises(
        ValueError, match=rf"{name}: .*student \(2, 4, 4\).*equally many heads"
    ):
        loss(jnp.zeros((2, 4, 4)), jnp.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=f"{name}: expected as many queries as keys"):
        loss(jnp.zeros((2, 4, 5)), jnp.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match=rf"{name}: .*bool \(1,\) or \(1, 4\), got"):
        x = jnp.zeros((1, 2, 4, 4))
        loss(x, x, where=jnp.ones((1, 2), bool))
