"""HCL against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program: without it, every operation would be compiled by itself.
hierarchical_context_loss = jax.jit(
    losses.hierarchical_context_loss, static_argnames="levels"
)


def formula(student, teacher, levels):
    """Both maps pooled bin by bin, one example at a time."""
    values = []
    for s, t in zip(np.float64(student), np.float64(teacher), strict=True):
        height, width, _ = s.shape
        total, weights, weight = ((s - t) ** 2).mean(), 1.0, 1.0
        for level in levels:
            if level >= min(height, width):
                continue
            weight, weights = weight / 2, weights + weight / 2
            error = 0.0
            for i in range(level):
                for j in range(level):
                    rows = slice(i * height // level, -(-(i + 1) * height // level))
                    columns = slice(j * width // level, -(-(j + 1) * width // level))
                    pooled = [x[rows, columns].mean((0, 1)) for x in (s, t)]
                    error += ((pooled[0] - pooled[1]) ** 2).mean() / level**2
            total += weight * error
        values.append(total / weights)
    return values


@pytest.mark.parametrize(
    "shape", [(8, 8, 3), (7, 6, 3), (4, 4, 3), (3, 9, 2), (1, 1, 5)]
)
@pytest.mark.parametrize("levels", [(4, 2, 1), (5, 3), ()])
def test_the_loss_is_the_formula(shape, levels):
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 3, *shape)).astype(np.float32)
    got = hierarchical_context_loss(
        jnp.array(student), jnp.array(teacher), levels=levels
    )
    np.testing.assert_allclose(got, formula(student, teacher, levels), rtol=1e-5)


def test_the_loss_is_the_code_summed_over_stages(golden):
    case = golden("reviewkd/hcl_4stages")
    students, teachers = (
        [case[f"in.{name}.{i}"] for i in range(4)] for name in ("fs", "ft")
    )

    def total(students):
        pairs = zip(students, teachers, strict=True)
        return sum(hierarchical_context_loss(s, t).mean() for s, t in pairs)

    value, gradients = jax.jit(jax.value_and_grad(total))(students)
    assert case.error("out.loss", value) < 1e-5
    for i, gradient in enumerate(gradients):
        assert case.error(f"grad.in.fs.{i}", gradient) < 1e-5
