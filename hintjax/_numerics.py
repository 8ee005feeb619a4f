"""Numbers that stay numbers: the float32 door, safe norms, masks, exact resizing.

Hints are full of exact zeros (ReLU) and often bfloat16. What is here has a finite,
bounded gradient at 0, lets nan through, and agrees with torch to rounding, because the
published numbers were made there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from hintjax import _checks


def as_float(caller: str, *arrays: Array) -> Array | list[Array]:
    """The arrays in one common float dtype of at least 32 bits.

    bfloat16 and float16 are raised to float32 (log_softmax, norms and sums need it),
    float64 stays. Integers and booleans are refused: they are images that were not
    normalised or labels in the wrong place. So is what has no entries, whose mean would
    be nan.

    Args:
        caller: the name of the function that the user called.
        *arrays: one array or several.

    Returns:
        The array, or the list of them if there were several.
    """
    raised = raise_float(caller, *arrays)
    if not all(array.size for array in arrays):
        got = " and ".join(map(_checks.described, arrays))
        raise _checks.Refusal(_checks.message(caller, "arrays with entries", got))
    return raised


def raise_float(caller: str, *arrays: Array) -> Array | list[Array]:
    """`as_float` of arrays that may have no entries."""
    if not all(
        _checks.is_array(array) and jnp.issubdtype(array.dtype, jnp.floating)
        for array in arrays
    ):
        got = " and ".join(map(_checks.described, arrays))
        do = "Convert first, e.g. x.astype(jnp.float32)."
        raise _checks.WrongType(
            _checks.message(caller, "floating-point arrays", got, do)
        )
    arrays = [jnp.asarray(array) for array in arrays]
    wide = any(array.dtype == jnp.float64 for array in arrays)
    arrays = [array.astype(jnp.float64 if wide else jnp.float32) for array in arrays]
    return arrays if len(arrays) > 1 else arrays[0]


def keep(x: Array, where: Bool[Array, "..."] | None) -> Array:
    """x where `where` holds and 0 elsewhere; `where` spans the first axes of x.

    Applied *before* anything that is not linear, so that a nan or inf that is masked
    out reaches neither the value nor the gradient.
    """
    if where is None:
        return x
    return jnp.where(jnp.expand_dims(where, tuple(range(where.ndim, x.ndim))), x, 0)


def masked_mean(
    x: Float[Array, "..."], where: Bool[Array, "..."] | None = None, batch_dims: int = 0
) -> Float[Array, "..."]:
    """Mean over all axes but the first `batch_dims`, of what `where` keeps.

    `where` spans the first axes of x. Where it keeps nothing, the mean is 0.
    """
    axes = tuple(range(batch_dims, x.ndim))
    if where is None:
        return jnp.mean(x, axes)
    count = jnp.sum(keep(jnp.ones_like(x), where), axes)
    return jnp.sum(keep(x, where), axes) / jnp.maximum(count, 1)


def either(first: Bool[Array, ""], one: PyTree, other: PyTree) -> PyTree:
    """One tree if `first`, else the other: the same bits, whatever they are."""
    return jax.tree.map(lambda a, b: jnp.where(first, a, b), one, other)


def norm(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
    """Euclidean norm whose gradient at 0 is 0, not nan.

    The inner `where` moves the square root away from 0, where its slope is infinite;
    the outer one puts the value back. (`== 0` and not `> 0`: nan stays nan.)
    """
    square = jnp.sum(jnp.square(x), axis)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def unit(
    x: Float[Array, "*shape"], axis: int | tuple[int, ...] = -1, eps: float = 1e-12
) -> Float[Array, "*shape"]:
    """x / max(||x||, eps), with no gradient inside the ball ||x|| <= eps.

    The value is torch's `F.normalize`. Its slope inside the ball is 1 / eps = 1e12:
    finite, so that no check for nan sees it, and enough to destroy a model. A vector
    that short has no direction to learn, so here it is a constant.
    """
    square = jnp.sum(jnp.square(x), axis, keepdims=True)
    tiny = square <= eps**2
    length = jnp.sqrt(jnp.where(tiny, 1, square))
    return jnp.where(tiny, jax.lax.stop_gradient(x / eps), x / length)


def deviations(
    x: Float[Array, "*shape n"], where: Bool[Array, " n"] | None = None
) -> Float[Array, "*shape n"]:
    """x less its mean along the last axis, and exactly 0 where it does not vary.

    The mean of equal numbers is rounded, so that what is left of them looks like a
    direction, and a norm that divides by it has a gradient of 1e7. Less than 16 units in
    the last place count as equal: 0, without gradient. `where` spans the last axis.
    """
    valid = jnp.ones(x.shape[-1], bool) if where is None else where
    x = jnp.where(valid, x, 0)
    count = jnp.maximum(jnp.sum(valid.astype(x.dtype)), 1)
    centred = jnp.where(valid, x - jnp.sum(x, -1, keepdims=True) / count, 0)
    noise = 16 * jnp.finfo(x.dtype).eps * norm(x)[..., None]
    return jnp.where(norm(centred)[..., None] <= noise, 0, centred)


def absolute_power(x: Float[Array, "*shape"], power: int) -> Float[Array, "*shape"]:
    """|x|^power for an integer power >= 1, with gradient 0 at 0.

    JAX has the gradient of `abs` at 0 at 1 where torch has 0, and after a ReLU most
    entries are exactly 0; `sign` is 0 there.
    """
    raised = jax.lax.integer_pow(x, power)
    return raised if power % 2 == 0 else raised * jnp.sign(x)


def adaptive_average_pool(
    x: Float[Array, "*batch h w c"], size: tuple[int, int]
) -> Float[Array, "*batch height width c"]:
    """Mean over bins [floor(i n / m), ceil((i + 1) n / m)) along both axes.

    The bins overlap where m does not divide n, which no ordinary pooling does. They
    are two small constant matrices, at full precision on every device.
    """
    _checks.positive_int("adaptive_average_pool", height=size[0], width=size[1])
    if x.shape[-3:-1] == tuple(size):
        return x
    rows, columns = (
        jnp.asarray(_bins(n, m), x.dtype)
        for n, m in zip(x.shape[-3:-1], size, strict=True)
    )
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, x, precision=precision)


def adaptive_max_pool(
    x: Float[Array, "*batch h w c"], size: tuple[int, int]
) -> Float[Array, "*batch height width c"]:
    """Maximum over the bins of `adaptive_average_pool`; of equal entries the first.

    After a ReLU a bin is often all 0. Torch gives the gradient to the first entry, in
    reading order, where `jnp.max` spreads it over all.
    """
    _checks.positive_int("adaptive_max_pool", height=size[0], width=size[1])
    # Columns first: then the first row that holds the maximum gives its first column.
    for axis, m in ((-2, size[1]), (-3, size[0])):
        n = x.shape[axis]
        if n != m:
            starts, stops = np.arange(m) * n // m, -(-np.arange(1, m + 1) * n // m)
            offsets = np.arange((stops - starts).max())
            # Shorter bins repeat their last entry, which is never the first maximum.
            index = np.minimum(starts[:, None] + offsets, stops[:, None] - 1)
            shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
            bins = jnp.take(x, index.ravel(), axis, mode="clip").reshape(shape)
            first = jnp.argmax(bins, axis, keepdims=True)
            x = jnp.take_along_axis(bins, first, axis, mode="clip").squeeze(axis)
    return x


def at_smaller_size(
    student: Float[Array, "*batch h w c"], teacher: Float[Array, "*batch h2 w2 c2"]
) -> tuple[Float[Array, "*batch h3 w3 c"], Float[Array, "*batch h3 w3 c2"]]:
    """Both maps, the larger averaged down to the smaller, along each axis alone."""
    size = tuple(map(min, student.shape[-3:-1], teacher.shape[-3:-1]))
    return adaptive_average_pool(student, size), adaptive_average_pool(teacher, size)


def nearest_resize(
    x: Float[Array, "*batch h w c"], size: tuple[int, int]
) -> Float[Array, "*batch height width c"]:
    """Entry floor(i n / m) along both axes: torch's `nearest`.

    `jax.image.resize` takes half-pixel centres: 8 to 4 is [1 3 5 7], not [0 2 4 6].
    """
    _checks.positive_int("nearest_resize", height=size[0], width=size[1])
    for axis, m in zip((-3, -2), size, strict=True):
        n = x.shape[axis]
        if n != m:
            x = jnp.take(x, np.arange(m) * n // m, axis, mode="clip")
    return x


def _bins(n: int, m: int) -> np.ndarray:
    """The (m, n) matrix of adaptive average pooling from n to m entries."""
    matrix = np.zeros((m, n))
    for i in range(m):
        start, stop = i * n // m, math.ceil((i + 1) * n / m)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
