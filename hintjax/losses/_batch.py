"""Shared parts of the losses that compare the examples of a batch."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep


def vectors(
    caller: str, student: Array, teacher: Array, where: Array | None
) -> list[Array]:
    """Returns both as (batch, n), checked, and 0 at masked examples."""
    arrays = as_float(caller, student, teacher)
    _checks.rank(caller, 2, "batch *features", student=arrays[0], teacher=arrays[1])
    if len(arrays[0]) != len(arrays[1]):
        wanted = "student and teacher to have the same batch, their first axis"
        got = f"student {arrays[0].shape} and teacher {arrays[1].shape}"
        do = "Give both networks the same examples."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    _checks.mask(caller, where, arrays[0].shape[:1])
    return [flat(keep(x, where)) for x in arrays]


def flat(x: Float[Array, "batch ..."]) -> Float[Array, "batch n"]:
    """Returns an array with all features of an example in one row."""
    return x.reshape(len(x), -1)


def counted(x: Array, where: Array | None) -> Bool[Array, " batch"]:
    """Returns the mask of the examples that count; all do if `where` is None."""
    return jnp.ones(len(x), bool) if where is None else where


def count(valid: Bool[Array, "..."], like: Array) -> Float[Array, ""]:
    """Returns the number of valid entries, at least 1, to divide sums by."""
    return jnp.maximum(jnp.sum(valid.astype(like.dtype)), 1)
