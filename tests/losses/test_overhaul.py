"""OFD against its formulas and the code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
batch_norm_margin, margin_relu, partial_l2_loss = map(
    jax.jit, (losses.batch_norm_margin, losses.margin_relu, losses.partial_l2_loss)
)


def formula_margin(scale, bias):
    below = math.erfc(bias / scale / math.sqrt(2)) / 2
    if below <= 0.001:
        return -3 * scale
    density = math.exp(-((bias / scale) ** 2) / 2) / math.sqrt(2 * math.pi)
    return bias - scale * density / below


def test_the_margin_is_the_formula():
    generator = np.random.default_rng(0)
    scale, bias = generator.normal(size=(2, 50)).astype(np.float32)
    bias[:10] *= 5
    got = batch_norm_margin(jnp.array(scale), jnp.array(bias))
    want = [formula_margin(abs(s), b) for s, b in zip(scale, bias, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.all(np.asarray(got) <= 0)


def test_the_margin_is_the_mean_of_what_is_negative():
    x = 0.7 * np.random.default_rng(0).normal(size=1_000_000) + 0.4
    got = batch_norm_margin(jnp.array([0.7]), jnp.array([0.4]))
    np.testing.assert_allclose(got, [x[x < 0].mean()], rtol=0.01)


total = jax.jit(jax.value_and_grad(lambda *norm: batch_norm_margin(*norm).sum()))


@pytest.mark.parametrize("bias", [-2.0, 0.0, 3.0])
def test_a_channel_that_is_switched_off_is_constant(bias):
    margin, slope = total(jnp.zeros(1), jnp.array([bias]))
    assert margin == min(bias, 0)
    assert np.isfinite(slope).all()


def test_the_loss_is_the_formula():
    generator = np.random.default_rng(0)
    s, t = generator.normal(size=(2, 3, 4, 4, 5)).astype(np.float32)
    m = -np.abs(generator.normal(size=5).astype(np.float32))
    # The formula is in three parts, on the teacher before its margin ReLU.
    want = (
        (s - m) ** 2 * ((s > m) & (t <= m))
        + (s - t) ** 2 * ((s > t) & (t > m) & (t <= 0))
        + (s - t) ** 2 * (t > 0)
    ).sum((1, 2, 3))
    got = partial_l2_loss(jnp.array(s), margin_relu(jnp.array(t), jnp.array(m)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_margins_are_the_code(golden):
    case = golden("ofd/mdistiller_eval")
    for i in range(2):
        scale, bias = (case[f"state.teacher_bn_{x}_{i}"] for x in ("weight", "bias"))
        assert case.error(f"out.margin_{i}", batch_norm_margin(scale, bias)) < 1e-5


def test_each_channel_has_its_margin(unchecked):
    with pytest.raises(ValueError, match=r"margin_relu: .*\(2, 3\) and margin \(2,\)"):
        margin_relu(jnp.ones((2, 3)), jnp.ones(2))
