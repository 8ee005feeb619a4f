"""CWD against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
channel_loss = jax.jit(losses.channel_loss, static_argnames="temperature")


def features(seed, shape=(2, 4, 3, 5)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def divergence(student, teacher, temperature):
    """Of one channel of one example, over its positions."""
    q, p = (np.exp(np.float64(x).ravel() / temperature) for x in (student, teacher))
    q, p = q / q.sum(), p / p.sum()
    return temperature**2 * (p * np.log(p / q)).sum()


def formula(student, teacher, temperature):
    return [
        np.mean([divergence(s[..., c], t[..., c], temperature) for c in range(5)])
        for s, t in zip(student, teacher, strict=True)
    ]


@pytest.mark.parametrize("temperature", [None, 4.0])
def test_loss_is_the_formula(temperature):
    student, teacher = features(0), features(1)
    hyper = {} if temperature is None else {"temperature": temperature}
    got = channel_loss(jnp.array(student), jnp.array(teacher), **hyper)
    want = formula(student, teacher, temperature or 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_mask_covers_positions():
    student, teacher = features(0), features(1)
    where = np.random.default_rng(2).random((2, 4, 3)) < 0.6
    got = channel_loss(jnp.array(student), jnp.array(teacher), where=jnp.array(where))
    want = [
        np.mean([divergence(s[m][:, c], t[m][:, c], 1.0) for c in range(5)])
        for s, t, m in zip(student, teacher, where, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_constant_on_a_channel_changes_nothing():
    student, teacher = features(0), features(1)
    shift = np.arange(5, dtype=np.float32)[None, None, None, :]
    want = channel_loss(student, teacher)
    np.testing.assert_allclose(channel_loss(student + shift, teacher), want, rtol=1e-4)


def test_a_single_position_has_no_signal():
    student, teacher = features(0)[:, :1, :1], jnp.zeros((2, 1, 1, 5))
    loss = jax.value_and_grad(lambda s: channel_loss(s, teacher).sum())
    value, gradient = jax.jit(loss)(student)
    assert value == np.abs(gradient).max() == 0


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_margins_of_120_are_bounded(temperature):
    student, teacher = np.zeros((2, 1, 2, 2, 1), np.float32)
    student[0, 0, 0], teacher[0, 1, 1] = 120, 120
    loss = jax.value_and_grad(
        lambda s, t: channel_loss(s, t, temperature=temperature).sum()
    )
    value, gradient = jax.jit(loss)(student, teacher)
    assert np.isfinite(value)
    assert np.abs(gradient).max() <= temperature * 1.001
