"""Shared parts of the losses whose arrays have positions: maps, volumes and tokens.

Such an array is (*batch, *positions, channels), with any number of axes of positions:
one for tokens or a sequence, two for a map, three for a volume.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import (
    AXES,
    adaptive_average_pool,
    as_float,
    keep,
    masked_mean,
    touched,
)


def per_example(
    values: Float[Array, "..."], where: Bool[Array, "..."] | None, batch_dims: int
) -> Float[Array, "..."]:
    """Returns the mean of each example's valid positions, and 0 without any.

    Without an axis of positions, it returns the values themselves.
    """
    if values.ndim == batch_dims:
        return keep(values, where)
    return masked_mean(values, where, batch_dims)


def check_maps(caller: str, batch_dims: int, **maps: Array) -> None:
    """Raise unless all maps have the same batch and the same number of positions axes.

    Sizes of the positions and channels may differ.
    """
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims + 2, "*batch *positions c", **maps)
    kinds = {(x.shape[:batch_dims], x.ndim) for x in maps.values()}
    if len(kinds) > 1:
        wanted = f"{' and '.join(maps)} to have the same batch and number of axes"
        got = " and ".join(f"{name} {x.shape}" for name, x in maps.items())
        do = "Reshape both to the same grid (hintjax.regressors.to_grid for tokens)."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))


def on_one_grid(
    caller: str,
    batch_dims: int,
    where: Array | None,
    pool: Callable[..., Array] = adaptive_average_pool,
    **maps: Array,
) -> list[Array]:
    """Returns two maps at the smaller size of each axis, checked.

    The mask is checked too, and is left to the caller to apply. Positions of a larger
    map that only masked positions are made of are 0 already: a nan there would reach
    the means of other positions.

    Args:
        caller: name of the function that the user called.
        batch_dims: number of leading axes over examples.
        where: mask of the examples, or of the positions of the smaller size.
        pool: `(map, size) -> map` of that size.
        **maps: two maps, (*batch, *positions, c), by name.
    """
    maps = dict(zip(maps, as_float(caller, *maps.values()), strict=True))
    check_maps(caller, batch_dims, **maps)
    sizes = [x.shape[batch_dims:-1] for x in maps.values()]
    size = tuple(map(min, *sizes))
    batch = next(iter(maps.values())).shape[:batch_dims]
    _checks.mask(caller, where, batch, (*batch, *size))
    return [pool(_read(x, where, size), size) for x in maps.values()]


def products(first: Array, second: Array, batch_dims: int) -> Float[Array, "..."]:
    """Returns the inner products of all pairs of channels over the positions."""
    axes = AXES[: first.ndim - batch_dims - 1]
    precision = jax.lax.Precision.HIGHEST
    equation = f"...{axes}i,...{axes}j->...ij"
    return jnp.einsum(equation, first, second, precision=precision)


def positions(x: Array, batch_dims: int) -> tuple[int, ...]:
    """Returns the axes of the positions."""
    return tuple(range(batch_dims, x.ndim - 1))


def _read(x: Array, where: Array | None, size: tuple[int, ...]) -> Array:
    """Returns a map with 0 at the positions that no unmasked position is made of."""
    grid = x.shape[-1 - len(size) : -1]
    if where is None or grid == size or where.ndim == x.ndim - 1 - len(size):
        return x
    return keep(x, touched(where, grid))
