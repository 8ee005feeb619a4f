"""Codings: how the arrays of a cache are stored."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Stored = dict[str, Array]


class Coding(NamedTuple):
    """A pair of functions between an array and its stored form.

    Attributes:
        encode: `array (batch, ...) -> stored arrays (batch, ...)`, by name.
        decode: the inverse; it gives floating-point values.
    """

    encode: Callable[[Array], Stored]
    decode: Callable[[Stored], Array]


def _as_bfloat16(x: Array) -> Stored:
    # numpy files know no bfloat16, so its 16 bits are stored.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return {"bfloat16": bits}


def _from_bfloat16(stored: Stored) -> Array:
    return jax.lax.bitcast_convert_type(stored["bfloat16"], jnp.bfloat16)


def _as_int8(x: Array) -> Stored:
    """Values in -127..127, with one scale per example and channel.

    A vector (batch, channels) has one scale per example.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim - 1)) if x.ndim > 2 else tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    scale = largest / 127
    values = jnp.round(x / jnp.where(scale > 0, scale, 1))
    return {"int8": values.astype(jnp.int8), "scale": scale}


def _from_int8(stored: Stored) -> Array:
    return stored["int8"].astype(jnp.float32) * stored["scale"]


# By the name that a user gives. "float32" keeps every bit of float32 and of narrower
# types; "bfloat16" keeps 8 significant bits; "int8" has an error of at most 1/254 of
# the largest value of the channel.
CODINGS = {
    "float32": Coding(
        lambda x: {"float32": x.astype(jnp.float32)}, lambda stored: stored["float32"]
    ),
    "bfloat16": Coding(_as_bfloat16, _from_bfloat16),
    "int8": Coding(_as_int8, _from_int8),
}
