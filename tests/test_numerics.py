"""Numerically safe functions: finite values and finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import _numerics

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]

# One program each: without it, every operation would be compiled by itself.
unit, norm = jax.jit(_numerics.unit), jax.jit(_numerics.norm, static_argnums=1)
masked_mean = jax.jit(_numerics.masked_mean, static_argnames="batch_dims")
adaptive_average_pool, adaptive_max_pool, nearest_resize = (
    jax.jit(resize, static_argnums=1)
    for resize in (
        _numerics.adaptive_average_pool,
        _numerics.adaptive_max_pool,
        _numerics.nearest_resize,
    )
)
slope_of_unit = jax.jit(jax.grad(lambda x: _numerics.unit(x)[0]))


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_door_raises_to_float32(dtype):
    assert _numerics.as_float("f", jnp.ones(2, dtype)).dtype == jnp.float32


def test_the_door_has_one_dtype_for_all():
    with jax.enable_x64(True):
        half, double = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float64)
        got = _numerics.as_float("f", half, double)
        assert [x.dtype for x in got] == [jnp.float64, jnp.float64]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_the_door_refuses_what_is_no_float(dtype):
    arrays = jnp.ones(2), jnp.ones((3, 4), dtype)
    with pytest.raises(TypeError, match=rf"^f: .*float32 \(2,\) and {dtype} \(3, 4\)"):
        _numerics.as_float("f", *arrays)


def test_unit_is_torch_normalize():
    x = normal((5, 7)) * np.float32([[1], [1e-5], [1e5], [1e-13], [0]])
    want = x / np.maximum(np.linalg.norm(np.float64(x), axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(unit(jnp.array(x)), want, rtol=1e-6)


@pytest.mark.parametrize("scale", [0, 1e-30, 1e-14])
def test_unit_has_no_gradient_where_there_is_no_direction(scale):
    gradient = slope_of_unit(normal((7,)) * np.float32(scale))
    np.testing.assert_array_equal(gradient, np.zeros(7))


def test_unit_has_the_gradient_of_a_direction():
    x = np.float64(normal((7,)))
    length = np.linalg.norm(x)
    want = (np.eye(7)[0] - x[0] * x / length**2) / length
    gradient = slope_of_unit(np.float32(x))
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-7)


def test_norm_and_its_gradient():
    x = normal((3, 7))
    x[0] = 0
    np.testing.assert_allclose(norm(x), np.linalg.norm(x, axis=1), rtol=1e-6)
    whole = norm(x, (0, 1))
    np.testing.assert_allclose(whole, np.linalg.norm(x), rtol=1e-6)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: norm(x).sum()))(x))
    np.testing.assert_array_equal(gradient[0], np.zeros(7))
    np.testing.assert_allclose(gradient[1:], np.asarray(unit(x))[1:], rtol=1e-6)


@pytest.mark.parametrize("f", [norm, unit])
def test_nan_stays_nan(f):
    assert np.isnan(f(jnp.array([[0, np.nan]]))).all()


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_absolute_power(power):
    x = jnp.array([-2.0, 0, 3])
    want = np.abs([-2.0, 0, 3]) ** power
    value = jax.jit(lambda x: _numerics.absolute_power(x, power))
    np.testing.assert_allclose(value(x), want)
    gradient = jax.jit(jax.grad(lambda x: value(x).sum()))(x)
    want = power * np.abs([-2.0, 0, 3]) ** (power - 1) * np.sign([-2, 0, 3])
    np.testing.assert_allclose(gradient, want)


def test_masked_mean_is_the_mean_of_what_is_kept():
    x = normal((3, 4, 5))
    where = np.random.default_rng(1).random((3, 4)) < 0.5
    where[2] = False
    x[~where] = np.nan
    got = masked_mean(jnp.array(x), jnp.array(where), batch_dims=1)
    want = [x[0][where[0]].mean(), x[1][where[1]].mean(), 0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    total = masked_mean(jnp.array(x), jnp.array(where))
    np.testing.assert_allclose(total, x[where].mean(), rtol=1e-6)
    plain = masked_mean(jnp.array(x[:1]), batch_dims=2)
    np.testing.assert_allclose(plain, x[:1].mean(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "bins"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (7, 4, [(0, 2), (1, 4), (3, 6), (5, 7)]),
        (10, 7, [(0, 2), (1, 3), (2, 5), (4, 6), (5, 8), (7, 9), (8, 10)]),
        (2, 3, [(0, 1), (0, 2), (1, 2)]),
        (5, 1, [(0, 5)]),
    ],
)
def test_adaptive_pooling_has_torch_bins(n, m, bins):
    x = normal((2, n, 3, 4))
    want = np.stack([x[:, start:stop].mean(1) for start, stop in bins], 1)
    got = adaptive_average_pool(jnp.array(x), (m, 3))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    got = np.swapaxes(adaptive_average_pool(np.swapaxes(x, 1, 2), (3, m)), 1, 2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "index"),
    [
        (5, 7, [0, 0, 1, 2, 2, 3, 4]),
        (8, 4, [0, 2, 4, 6]),
        (3, 6, [0, 0, 1, 1, 2, 2]),
        (7, 4, [0, 1, 3, 5]),
    ],
)
def test_nearest_resize_has_torch_indices(n, m, index):
    x = normal((2, n, 3, 4))
    got = nearest_resize(jnp.array(x), (m, 3))
    np.testing.assert_array_equal(got, x[:, index])
    got = np.swapaxes(nearest_resize(np.swapaxes(x, 1, 2), (3, m)), 1, 2)
    np.testing.assert_array_equal(got, x[:, index])


@pytest.mark.parametrize("resize", [adaptive_average_pool, nearest_resize])
def test_a_size_is_positive(resize):
    with pytest.raises(ValueError, match=f"{resize.__name__}.*size"):
        resize(jnp.zeros((1, 4, 4, 1)), (0, 4))


@pytest.mark.parametrize("size", [(4, 3), (2, 5), (1, 1), (8, 7)])
def test_max_pooling_gives_the_first_maximum_its_gradient(size):
    x = np.float32(np.random.default_rng(0).integers(0, 3, (2, 8, 7, 3)))
    want, gradient = np.zeros((2, *size, 3)), np.zeros_like(x)
    for i, j in np.ndindex(size):
        rows = slice(i * 8 // size[0], -(-(i + 1) * 8 // size[0]))
        columns = slice(j * 7 // size[1], -(-(j + 1) * 7 // size[1]))
        window = x[:, rows, columns]
        for b, c in np.ndindex(2, 3):
            flat = window[b, ..., c].ravel()
            want[b, i, j, c] = flat.max()
            k = np.unravel_index(flat.argmax(), window.shape[1:3])
            gradient[b, rows.start + k[0], columns.start + k[1], c] += 1

    @jax.jit
    def both(x):
        got, back = jax.vjp(lambda x: adaptive_max_pool(x, size), x)
        return got, back(jnp.ones_like(got))[0]

    got, slope = both(x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(slope, gradient)


def test_what_has_no_entries_has_no_mean(unchecked):
    with pytest.raises(ValueError, match="loss: expected arrays with entries, got"):
        _numerics.as_float("loss", jnp.zeros((4, 0)), jnp.zeros((4, 3)))
    assert (
        _numerics.raise_float("loss", jnp.zeros((4, 0), jnp.bfloat16)).dtype
        == jnp.float32
    )


@pytest.mark.parametrize(("n", "m"), [(4, 2), (7, 4), (10, 7), (5, 1)])
def test_pooling_and_resizing_take_any_number_of_axes(n, m):
    """A sequence is a map of one column, and a volume of one layer of such maps."""
    x = normal((2, n, 4))
    for resize in (
        adaptive_average_pool,
        adaptive_max_pool,
        nearest_resize,
    ):
        want = np.asarray(resize(x[:, :, None], (m, 1)))
        np.testing.assert_allclose(resize(x, (m,)), want[:, :, 0], rtol=1e-6)
        got = np.asarray(resize(x[:, None, :, None], (1, m, 1)))
        np.testing.assert_allclose(got[:, 0], want, rtol=1e-6)


@pytest.mark.parametrize(("grid", "size"), [((7,), (4,)), ((7, 4), (3, 4))])
def test_touched_entries_are_those_of_unmasked_bins(grid, size):
    where = np.random.default_rng(0).random((3, *size)) < 0.4
    got = jax.jit(lambda where: _numerics.touched(where, grid))(where)
    want = np.zeros((3, *grid), bool)
    for i in np.argwhere(where):
        window = tuple(
            slice(k * n // m, -(-(k + 1) * n // m))
            for k, n, m in zip(i[1:], grid, size, strict=True)
        )
        want[(i[0], *window)] = True
    np.testing.assert_array_equal(got, want)
