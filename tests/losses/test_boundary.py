"""AB against its formula and the benchmark's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
activation_boundary_loss = jax.jit(
    losses.activation_boundary_loss, static_argnames="margin"
)


@pytest.mark.parametrize("margin", [0.5, 1.0, 120.0])
def test_the_loss_is_the_formula(margin):
    generator = np.random.default_rng(0)
    s, t = 2 * np.round(generator.normal(size=(2, 3, 4, 4, 5)), 1).astype(np.float32)
    t[:, 0] = 0  # off, and a boundary case of the formula
    off = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
    on = (s - margin) ** 2 * ((s <= margin) & (t > 0))
    got = activation_boundary_loss(jnp.array(s), jnp.array(t), margin=margin)
    np.testing.assert_allclose(got, (off + on).sum((1, 2, 3)), rtol=1e-5)


def test_the_loss_is_the_code_weighed_by_depth(golden):
    case = golden("ab/rep_3stages")
    students, teachers = (
        [case[f"in.g_{network}.{i}"] for i in range(3)] for network in "st"
    )

    def total(students):
        return sum(
            3 / 1000 * 2.0 ** (i - 2) * activation_boundary_loss(s, t).mean()
            for i, (s, t) in enumerate(zip(students, teachers, strict=True))
        )

    value, gradients = jax.jit(jax.value_and_grad(total))(students)
    assert case.error("out.loss", value) < 1e-5
    for i, gradient in enumerate(gradients):
        assert case.error(f"grad.in.g_s.{i}", gradient) < 1e-5


def test_a_student_beyond_the_margin_is_done():
    teacher = jnp.array([[-0.1, 0.1, 5.0, -7.0]])
    total = jax.value_and_grad(lambda s: activation_boundary_loss(s, teacher).sum())
    value, gradient = jax.jit(total)(jnp.array([[-1.0, 1.0, 2.0, -9.0]]))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


@pytest.mark.parametrize("margin", [0.0, -1.0, float("inf")])
def test_a_margin_is_positive(unchecked, margin):
    x = jnp.ones((1, 2))
    with pytest.raises(
        ValueError, match="activation_boundary_loss: .*margin to be > 0"
    ):
        activation_boundary_loss(x, x, margin=margin)
