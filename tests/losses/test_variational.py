"""VID against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
variational_loss = jax.jit(losses.variational_loss)


@pytest.mark.parametrize("shape", [(4, 3, 5), (7, 5), (5,)])
def test_the_loss_is_the_formula(shape):
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 3, *shape)).astype(np.float32)
    scale = generator.normal(size=5).astype(np.float32)
    variance = np.log(1 + np.exp(np.float64(scale))) + 1e-5
    each = ((student - teacher) ** 2 / variance + np.log(variance)) / 2
    got = variational_loss(*map(jnp.array, (student, teacher)), scale=jnp.array(scale))
    np.testing.assert_allclose(got, each.reshape(3, -1).mean(1), rtol=1e-5)


def test_the_loss_is_the_code(golden):
    case = golden("vid/rep_equal")
    names = {
        **{
            f"param.regressor.{i}.weight": f"param.regressor.{i}.weight"
            for i in (0, 2, 4)
        },
        "in.f_s": "in.f_s",
        "param.log_scale": "param.log_scale",
    }

    def loss(arrays):
        x = arrays["in.f_s"]
        for i in (0, 2, 4):
            x = jax.nn.relu(x) if i else x
            x = x @ arrays[f"param.regressor.{i}.weight"][0, 0]
        scale = arrays["param.log_scale"]
        return variational_loss(x, case["in.f_t"], scale=scale).mean()

    arrays = {name: case[name] for name in names}
    value, gradients = jax.jit(jax.value_and_grad(loss))(arrays)
    assert case.error("out.loss", value) < 1e-5
    for name, gradient in gradients.items():
        assert case.error(f"grad.{name}", gradient) < 1e-5


@jax.jit
@jax.value_and_grad
def total(scale):
    ones = jnp.ones((2, 3))
    return variational_loss(ones, 2 * ones, scale=scale).sum()


@pytest.mark.parametrize("scale", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_any_scale_is_finite(scale):
    value, gradient = total(np.full(3, scale, np.float32))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_a_channel_has_one_scale(unchecked):
    x = jnp.ones((2, 4, 4, 3))
    with pytest.raises(
        ValueError, match=r"variational_loss: .*3 channels, got .*\(4,\)"
    ):
        variational_loss(x, x, scale=jnp.ones(4))
