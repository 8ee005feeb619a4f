"""DIST against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
OPTIONS = "beta", "gamma", "temperature"
dist_loss = jax.jit(losses.dist_loss, static_argnames=OPTIONS)


def logits(seed, shape=(5, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def softmax(z):
    return np.exp(np.float64(z)) / np.exp(np.float64(z)).sum(-1, keepdims=True)


def pearsons(x, y):
    return np.array([np.corrcoef(*rows)[0, 1] for rows in zip(x, y, strict=True)])


@pytest.mark.parametrize("hyper", [(), (2.0, 0.5, 4.0)])
def test_loss_is_the_formula(hyper):
    names = dict(zip(("beta", "gamma", "temperature"), hyper, strict=False))
    beta, gamma, temperature = hyper or (1.0, 1.0, 1.0)
    student, teacher = logits(0), logits(1)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    within, between = 1 - pearsons(q, p), 1 - pearsons(q.T, p.T).mean()
    want = temperature**2 * (beta * within + gamma * between)
    got = dist_loss(jnp.array(student), jnp.array(teacher), **names)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_loss_matches_the_code(golden):
    case = golden("dist/b8_c20")
    value_and_grad = jax.value_and_grad(lambda s, t: dist_loss(s, t).mean())
    value, gradient = jax.jit(value_and_grad)(case["in.y_s"], case["in.y_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.y_s", gradient) < 1e-5


def test_equality_is_the_least_up_to_the_published_eps():
    teacher = jnp.array(logits(0, (4, 10)))
    loss = jax.value_and_grad(lambda s: dist_loss(s, teacher).mean())
    value, gradient = jax.jit(loss)(teacher)
    assert abs(value) < 1e-5
    assert np.abs(gradient).max() < 1e-5


def test_a_batch_of_one_has_the_codes_second_term():
    """The loss of one example is 1 and has no gradient."""
    student, teacher = jnp.array(logits(0)[:1]), jnp.array(logits(1)[:1])
    loss = jax.value_and_grad(lambda s, t: dist_loss(s, t, beta=0.0).sum())
    value, gradient = jax.jit(loss)(student, teacher)
    assert value == 1
    np.testing.assert_array_equal(gradient, 0)


def test_equal_examples_and_even_ones_have_no_gradient():
    """Their columns and rows do not vary, up to rounding."""
    even, same = np.full((6, 7), 0.3, np.float32), logits(0)[:1].repeat(6, 0)
    teacher = jnp.array(logits(1, (6, 7)))
    between = jax.jit(jax.grad(lambda s: dist_loss(s, teacher, beta=0.0).sum()))
    both = jax.jit(jax.grad(lambda s: dist_loss(s, teacher).sum()))
    np.testing.assert_array_equal(between(same), 0)
    np.testing.assert_array_equal(both(even), 0)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_margins_of_120_are_bounded(temperature):
    student, teacher = (np.eye(5, 7, dtype=np.float32) * sign for sign in (120, -120))
    loss = jax.value_and_grad(
        lambda s, t: dist_loss(s, t, temperature=temperature).sum()
    )
    value, gradient = jax.jit(loss)(student, teacher)
    assert 0 <= value <= 5 * 4 * temperature**2
    assert np.abs(gradient).max() < 100 * temperature


def test_logits_without_a_batch_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"dist_loss: .*at least 2 axes.*shape \(4,\)"):
        dist_loss(jnp.zeros(4), jnp.zeros(4))
