"""FSP against its formula and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses

pytestmark = pytest.mark.usefixtures("strict")

# One program each: without it, every operation would be compiled by itself.
fsp_loss, fsp_loss_paper = map(jax.jit, (losses.fsp_loss, losses.fsp_loss_paper))
fsp_matrix, fsp_matrix_paper = map(
    jax.jit, (losses.fsp_matrix, losses.fsp_matrix_paper)
)


def features(seed, shape):
    x = np.random.default_rng(seed).normal(size=(3, *shape))
    return np.maximum(x, 0).astype(np.float32)


def formula_pool(x, height, width, reduce):
    """Adaptive pooling, bin by bin."""
    h, w, _ = x.shape
    pooled = np.zeros((height, width, x.shape[-1]))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            pooled[i, j] = reduce(x[rows, columns], (0, 1))
    return pooled


def formula_matrix(first, second, reduce):
    """sum over positions of the outer products, one example at a time."""
    matrices = []
    for one, two in zip(np.float64(first), np.float64(second), strict=True):
        h, w = np.minimum(one.shape[:2], two.shape[:2])
        one, two = (formula_pool(x, h, w, reduce) for x in (one, two))
        outer = [np.outer(one[i, j], two[i, j]) for i in range(h) for j in range(w)]
        matrices.append(sum(outer) / (h * w))
    return np.array(matrices)


SIZES = [((4, 4), (4, 4)), ((8, 6), (4, 3)), ((3, 5), (7, 2)), ((1, 1), (5, 5))]


@pytest.mark.parametrize(("first", "second"), SIZES)
def test_the_losses_are_the_formulas(first, second):
    student = features(0, (*first, 3)), features(1, (*second, 5))
    teacher = features(2, (*second, 3)), features(3, (9, 9, 5))
    for loss, matrix, pool, reduce in (
        (fsp_loss, fsp_matrix, np.mean, np.mean),
        (fsp_loss_paper, fsp_matrix_paper, np.max, np.sum),
    ):
        ours, theirs = (formula_matrix(*flow, pool) for flow in (student, teacher))
        got = matrix(*map(jnp.array, student))
        np.testing.assert_allclose(got, ours, rtol=1e-5)
        got = loss(tuple(map(jnp.array, student)), tuple(map(jnp.array, teacher)))
        np.testing.assert_allclose(got, reduce((ours - theirs) ** 2, (1, 2)), rtol=1e-5)


def test_the_loss_is_the_code(golden):
    case = golden("fsp/rep_4layers")
    students, teachers = (
        [case[f"in.g_{network}.{i}"] for i in range(4)] for network in "st"
    )

    def total(students):
        values = [
            fsp_loss(
                (students[i], students[i + 1]), (teachers[i], teachers[i + 1])
            ).mean()
            for i in range(3)
        ]
        return sum(values), jnp.stack(values)

    (value, each), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(
        students
    )
    assert case.error("out.loss", value) < 1e-5
    assert case.error("out.per_pair", each) < 1e-5
    for i, gradient in enumerate(gradients):
        assert case.error(f"grad.in.g_s.{i}", gradient) < 1e-5
    for i in range(3):
        matrix = fsp_matrix(students[i], students[i + 1])
        name = f"out.fsp_s_{i}_layout_B_top_bot"
        assert case.error(name, np.swapaxes(matrix, 1, 2)) < 1e-5


def test_the_paper_is_the_sum_of_the_mean_for_equal_sizes():
    student = jnp.array(features(0, (4, 4, 3))), jnp.array(features(1, (4, 4, 5)))
    teacher = jnp.array(features(2, (6, 6, 3))), jnp.array(features(3, (6, 6, 5)))
    want = 15 * np.asarray(fsp_loss(student, teacher))
    np.testing.assert_allclose(fsp_loss_paper(student, teacher), want, rtol=1e-5)


def test_channels_that_differ_ask_for_a_regressor(unchecked):
    flow = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 5))
    other = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 2, 2, 6))
    with pytest.raises(ValueError, match=r"same examples and channels.*regressor"):
        losses.fsp_loss(flow, other)


@pytest.mark.parametrize("matrix", [fsp_matrix, fsp_matrix_paper])
def test_a_matrix_is_the_mean_over_the_valid_positions(matrix):
    first, second = features(0, (6, 3)), features(1, (6, 5))
    where = np.arange(6) < np.array([[6], [2], [0]])
    got = np.asarray(matrix(first, second, where=where))
    for i, n in enumerate((6, 2, 0)):
        want = first[i, :n].T @ second[i, :n] / max(n, 1)
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-7)


def test_flows_of_tokens_and_of_volumes_are_the_formula():
    for one, two in (((7,), (3,)), ((4, 2, 6), (2, 4, 3))):
        first, second = features(0, (*one, 3)), features(1, (*two, 5))
        got = fsp_matrix(jnp.array(first), jnp.array(second))
        size = np.minimum(one, two)
        pooled = []
        for x in (first, second):
            bins = np.zeros((3, *size, x.shape[-1]))
            for j in np.ndindex(*size):
                window = tuple(
                    slice(i * n // m, -(-(i + 1) * n // m))
                    for i, n, m in zip(j, x.shape[1:-1], size, strict=True)
                )
                axes = tuple(range(1, x.ndim - 1))
                bins[(slice(None), *j)] = x[(slice(None), *window)].mean(axes)
            pooled.append(bins.reshape(3, -1, x.shape[-1]))
        want = np.einsum("bjm,bjn->bmn", *pooled) / np.prod(size)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_mask_of_positions_fits_both_flows(unchecked):
    tokens, fewer = jnp.ones((2, 6, 3)), jnp.ones((2, 4, 3))
    where = jnp.ones((2, 6), bool)
    fsp_loss((tokens, tokens), (tokens, tokens), where=where)
    with pytest.raises(ValueError, match=r"fsp_loss: .*\(2, 4\), got bool \(2, 6\)"):
        losses.fsp_loss((tokens, tokens), (fewer, tokens), where=where)
