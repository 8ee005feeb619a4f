"""NST against its formula and the benchmark's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
selectivity_loss = jax.jit(losses.selectivity_loss)


def formula(student, teacher):
    """Over all pairs of neurons, one example at a time."""
    values = []
    for s, t in zip(np.float64(student), np.float64(teacher), strict=True):
        s, t = (x.reshape(-1, x.shape[-1]).T for x in (s, t))
        s, t = ([row / np.linalg.norm(row) for row in x] for x in (s, t))
        ss, tt, st = (
            np.mean([(a @ b) ** 2 for a in x for b in y])
            for x, y in ((s, s), (t, t), (s, t))
        )
        values.append(ss + tt - 2 * st)
    return values


@pytest.mark.parametrize("shape", [(4, 6, 3), (8, 12, 7), (1, 1, 2)])
def test_the_loss_is_the_formula(shape):
    generator = np.random.default_rng(0)
    student = generator.normal(size=(3, 4, 6, 5)).astype(np.float32)
    teacher = generator.normal(size=(3, *shape)).astype(np.float32)
    height, width = np.minimum(shape[:2], (4, 6))
    pooled = [
        x.reshape(3, height, x.shape[1] // height, width, x.shape[2] // width, -1).mean(
            (2, 4)
        )
        for x in (student, teacher)
    ]
    got = selectivity_loss(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(got, formula(*pooled), rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_code(golden):
    case = golden("nst/rep")
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s, t: selectivity_loss(s, t).mean())
    )(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


def test_scale_and_order_of_channels_do_not_matter():
    generator = np.random.default_rng(0)
    student, teacher = np.float32(generator.normal(size=(2, 3, 4, 4, 5)))
    scale = np.float32([[[[1e-3, 1.0, 2.0, 5.0, 1e3]]]])
    got = selectivity_loss((student * scale)[..., ::-1], teacher)
    np.testing.assert_allclose(got, selectivity_loss(student, teacher), rtol=1e-4)
