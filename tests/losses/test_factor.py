"""FT against its formula and the benchmark's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.losses import factor_loss

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize(("power", "exponent"), [(2, 1), (2, 2), (1, 1), (3, 3)])
def test_the_loss_is_the_formula(power, exponent):
    generator = np.random.default_rng(0)
    student = generator.normal(size=(3, 4, 6, 5)).astype(np.float32)
    teacher = generator.normal(size=(3, 8, 6, 7)).astype(np.float32)
    pooled = teacher.reshape(3, 4, 2, 6, 7).mean(2)
    maps = [(np.abs(x) ** power).mean(-1).reshape(3, -1) for x in (student, pooled)]
    maps = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in maps]
    want = (np.abs(maps[0] - maps[1]) ** exponent).mean(1)
    arrays = jnp.array(student), jnp.array(teacher)
    got = factor_loss(*arrays, power=power, exponent=exponent)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_the_loss_is_the_code(golden):
    case = golden("ft/rep_p2_1")
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s, t: factor_loss(s, t).mean())
    )(case["in.f_s"], case["in.f_t"])
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", gradient) < 1e-5


@pytest.mark.parametrize("name", ["power", "exponent"])
def test_powers_are_positive_integers(unchecked, name):
    x = jnp.ones((1, 2, 2, 3))
    with pytest.raises(ValueError, match=f"factor_loss: .*{name}.*integer >= 1"):
        factor_loss(x, x, **{name: 0})
