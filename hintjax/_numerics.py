"""Safe numerics: conversion to float32, norms, masks and exact resizing.

Hints have many exact zeros (ReLU) and are often bfloat16. Each function here has a
finite, bounded gradient at 0, keeps nan as nan, and agrees with torch up to rounding,
because the published numbers were computed with torch.
"""

import math
import string
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from hintjax import _checks

# Letters of the axes of positions in an equation of `einsum`, in order.
AXES = string.ascii_uppercase


@overload
def as_float(caller: str, array: Array, /) -> Array: ...


@overload
def as_float(
    caller: str, first: Array, second: Array, /, *others: Array
) -> list[Array]: ...


def as_float(caller: str, *arrays: Array) -> Array | list[Array]:
    """Returns the arrays in one common float dtype of at least 32 bits.

    bfloat16 and float16 become float32, because log_softmax, norms and sums need it;
    float64 stays float64. Integers and booleans are refused: they are images that were
    not normalized, or labels in the wrong place. Arrays without entries are refused
    too, because their mean would be nan.

    Args:
        caller: name of the function that the user called.
        *arrays: one array or several.

    Returns:
        The array, or a list if several arrays were given.
    """
    floats = _floats(caller, arrays)
    if not all(array.size for array in arrays):
        got = " and ".join(map(_checks.described, arrays))
        raise _checks.Refusal(_checks.message(caller, "arrays with entries", got))
    return floats if len(floats) > 1 else floats[0]


@overload
def raise_float(caller: str, array: Array, /) -> Array: ...


@overload
def raise_float(
    caller: str, first: Array, second: Array, /, *others: Array
) -> list[Array]: ...


def raise_float(caller: str, *arrays: Array) -> Array | list[Array]:
    """Does the same as `as_float`, but also accepts arrays without entries."""
    floats = _floats(caller, arrays)
    return floats if len(floats) > 1 else floats[0]


def _floats(caller: str, arrays: tuple[Array, ...]) -> list[Array]:
    """Returns the arrays in one common float dtype of at least 32 bits."""
    if not all(
        _checks.is_array(array) and jnp.issubdtype(array.dtype, jnp.floating)
        for array in arrays
    ):
        got = " and ".join(map(_checks.described, arrays))
        do = "Convert first, e.g. x.astype(jnp.float32)."
        raise _checks.WrongType(
            _checks.message(caller, "floating-point arrays", got, do)
        )
    floats = [jnp.asarray(array) for array in arrays]
    wide = any(array.dtype == jnp.float64 for array in floats)
    return [array.astype(jnp.float64 if wide else jnp.float32) for array in floats]


def keep(x: Array, where: Bool[Array, "..."] | None) -> Array:
    """Returns x where the mask is true and 0 elsewhere.

    The mask `where` spans the first axes of x. It is applied *before* every nonlinear
    operation, so that a masked nan or inf reaches neither the value nor the gradient.
    """
    if where is None:
        return x
    return jnp.where(jnp.expand_dims(where, tuple(range(where.ndim, x.ndim))), x, 0)


def masked_mean(
    x: Float[Array, "..."], where: Bool[Array, "..."] | None = None, batch_dims: int = 0
) -> Float[Array, "..."]:
    """Returns the mean of the unmasked entries over all but `batch_dims` axes.

    The first `batch_dims` axes of x remain. The mask `where` spans the first axes of x.
    The mean of no entries is 0.
    """
    axes = tuple(range(batch_dims, x.ndim))
    if where is None:
        return jnp.mean(x, axes)
    count = jnp.sum(keep(jnp.ones_like(x), where), axes)
    return jnp.sum(keep(x, where), axes) / jnp.maximum(count, 1)


def either(first: Bool[Array, ""], one: PyTree, other: PyTree) -> PyTree:
    """Returns `one` if `first` is true, else `other`, bit by bit (nan too)."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


def norm(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
    """Returns the Euclidean norm, with the gradient 0 at 0 instead of nan.

    The inner `where` moves the square root away from 0, where its slope is infinite;
    the outer `where` restores the value. The test is `== 0`, not `> 0`, so that nan
    stays nan.
    """
    square = jnp.sum(jnp.square(x), axis)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def unit(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...] = -1, eps: float = 1e-12
) -> Float[Array, "*shape"]:
    """Returns x / max(||x||, eps), without gradient where ||x|| <= eps.

    The value is that of torch's `F.normalize`. The slope of `F.normalize` for such
    short vectors is 1 / eps = 1e12: finite, so no check for nan finds it, but large
    enough to destroy a model. So short a vector has no direction to learn, so here
    it is a constant.
    """
    square = jnp.sum(jnp.square(x), axis, keepdims=True)
    tiny = square <= eps**2
    length = jnp.sqrt(jnp.where(tiny, 1, square))
    return jnp.where(tiny, jax.lax.stop_gradient(x / eps), x / length)


def deviations(
    x: Float[Array, "*shape n"], where: Bool[Array, " n"] | None = None
) -> Float[Array, "*shape n"]:
    """Returns x minus its mean along the last axis, exactly 0 for a constant x.

    The mean of equal numbers is rounded, so their differences from it look like a
    direction, and dividing by the norm of the differences gives a gradient of 1e7.
    Numbers that differ by less than 16 units in the last place count as equal: their
    deviations are 0, without gradient. The mask `where` spans the last axis.
    """
    valid = jnp.ones(x.shape[-1], bool) if where is None else where
    x = jnp.where(valid, x, 0)
    count = jnp.maximum(jnp.sum(valid.astype(x.dtype)), 1)
    centered = jnp.where(valid, x - jnp.sum(x, -1, keepdims=True) / count, 0)
    noise = 16 * jnp.finfo(x.dtype).eps * norm(x)[..., None]
    return jnp.where(norm(centered)[..., None] <= noise, 0, centered)


def absolute_power(x: Float[Array, "*shape"], power: int) -> Float[Array, "*shape"]:
    """Returns |x|^power for an integer power >= 1, with gradient 0 at 0.

    The gradient of `abs` at 0 is 1 in JAX and 0 in torch, and after a ReLU most entries
    are exactly 0. This function uses `sign`, which is 0 at 0.
    """
    raised = jax.lax.integer_pow(x, power)
    return raised if power % 2 == 0 else raised * jnp.sign(x)


def adaptive_average_pool(
    x: Float[Array, "*shape c"], size: tuple[int, ...]
) -> Float[Array, "*pooled c"]:
    """Returns means over bins [floor(i n / m), ceil((i + 1) n / m)) of each axis.

    The bins overlap if m does not divide n; the bins of ordinary pooling never do. One
    small constant matrix for each axis holds its bins and multiplies x, at full
    precision on every device.

    Args:
        x: any batch axes, one axis for each entry of `size`, and channels.
        size: numbers of bins: (height, width) for a map, one for a sequence, three for
            a volume.
    """
    grid = _grid("adaptive_average_pool", x, size)
    if grid == tuple(size):
        return x
    bins = [jnp.asarray(_bins(n, m), x.dtype) for n, m in zip(grid, size, strict=True)]
    before, after = AXES[: len(size)], AXES[len(size) : 2 * len(size)]
    matrices = ",".join(map("".join, zip(after, before, strict=True)))
    equation = f"{matrices},...{before}c->...{after}c"
    return jnp.einsum(equation, *bins, x, precision=jax.lax.Precision.HIGHEST)


def adaptive_max_pool(
    x: Float[Array, "*shape c"], size: tuple[int, ...]
) -> Float[Array, "*pooled c"]:
    """Returns maxima over the bins of `adaptive_average_pool`.

    After a ReLU all entries of a bin are often 0. As in torch, the first of the equal
    entries, in reading order, receives the gradient; `jnp.max` spreads the gradient
    over all of them.
    """
    grid = _grid("adaptive_max_pool", x, size)
    # The last axis comes first: then the first row with the maximum gives its first
    # column.
    for axis, n, m in reversed(list(zip(_axes(size), grid, size, strict=True))):
        if n != m:
            starts, stops = np.arange(m) * n // m, -(-np.arange(1, m + 1) * n // m)
            offsets = np.arange((stops - starts).max())
            # Shorter bins repeat their last entry; a repeated entry is never the first
            # maximum.
            index = np.minimum(starts[:, None] + offsets, stops[:, None] - 1)
            shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
            bins = jnp.take(x, index.ravel(), axis, mode="clip").reshape(shape)
            first = jnp.argmax(bins, axis, keepdims=True)
            x = jnp.take_along_axis(bins, first, axis, mode="clip").squeeze(axis)
    return x


def at_smaller_size(
    student: Float[Array, "batch ... c"], teacher: Float[Array, "batch ... c2"]
) -> tuple[Float[Array, "batch ... c"], Float[Array, "batch ... c2"]]:
    """Returns both maps, averaged down along each axis to the smaller size.

    The axes between the first and the last are positions, as many in both maps.
    """
    size = tuple(map(min, student.shape[1:-1], teacher.shape[1:-1]))
    return adaptive_average_pool(student, size), adaptive_average_pool(teacher, size)


def touched(
    where: Bool[Array, "*small"], grid: tuple[int, ...]
) -> Bool[Array, "*large"]:
    """Returns the mask of a larger grid: entries in the bin of any unmasked position.

    Args:
        where: the mask of the positions of the smaller grid, after any batch axes.
        grid: the larger grid, which `adaptive_average_pool` makes smaller.
    """
    for axis, n in zip(range(-len(grid), 0), grid, strict=True):
        holds = _bins(n, where.shape[axis]) > 0  # (small, large)
        holds = np.expand_dims(holds, tuple(range(where.ndim - 1)))
        each = jnp.moveaxis(where, axis, -1)[..., None] & holds
        where = jnp.moveaxis(jnp.any(each, -2), -1, axis)
    return where


def nearest_resize(
    x: Float[Array, "*shape c"], size: tuple[int, ...]
) -> Float[Array, "*resized c"]:
    """Returns the entries floor(i n / m) of each axis, as torch's `nearest` does.

    `jax.image.resize` uses half-pixel centers: from 8 entries to 4 it takes
    [1 3 5 7], not [0 2 4 6].
    """
    grid = _grid("nearest_resize", x, size)
    for axis, n, m in zip(_axes(size), grid, size, strict=True):
        if n != m:
            x = jnp.take(x, np.arange(m) * n // m, axis, mode="clip")
    return x


def bilinear_resize(
    x: Float[Array, "*shape c"], size: tuple[int, ...]
) -> Float[Array, "*resized c"]:
    """Returns the linear interpolation along each axis, as torch's `bilinear` does.

    Positions are the centers of pixels (`align_corners=False`). The smaller of two
    sizes skips entries instead of averaging them: there is no antialiasing.

    Args:
        x: any batch axes, one axis for each entry of `size`, and channels.
        size: (height, width) for a map, one number for a sequence, three for a volume.
    """
    grid = _grid("bilinear_resize", x, size)
    for axis, n, m in zip(_axes(size), grid, size, strict=True):
        if n != m:
            place = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
            below = np.floor(place).astype(np.int32)
            above = np.minimum(below + 1, n - 1)
            share = jnp.asarray(place - below, x.dtype)
            share = jnp.expand_dims(share, tuple(range(1, -axis)))
            share = jnp.expand_dims(share, tuple(range(x.ndim - share.ndim)))
            low, high = (jnp.take(x, i, axis, mode="clip") for i in (below, above))
            x = low * (1 - share) + high * share
    return x


def _grid(caller: str, x: Array, size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes of the axes that a resize to `size` changes, checked."""
    _checks.sizes(caller, 0, size=size)
    if not _checks.is_array(x) or x.ndim <= len(size):
        wanted = f"an array with {len(size)} axes of positions and channels"
        raise _checks.Refusal(_checks.message(caller, wanted, _checks.described(x)))
    return x.shape[-1 - len(size) : -1]


def _axes(size: tuple[int, ...]) -> range:
    """Returns the axes that a resize to `size` changes, from the end."""
    return range(-1 - len(size), -1)


def _bins(n: int, m: int) -> np.ndarray:
    """Returns the (m, n) matrix of adaptive average pooling from n to m entries."""
    matrix = np.zeros((m, n))
    for i in range(m):
        start, stop = i * n // m, math.ceil((i + 1) * n / m)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
