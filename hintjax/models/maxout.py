"""Maxout: a unit is the largest of several linear pieces."""

import jax
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """Initializer U(-bound, bound), independent of the fan.

    Args:
        bound: largest absolute value, > 0.

    Returns:
        An initializer `(key, shape, dtype) -> Array`.

    Example:
        >>> init = symmetric_uniform(0.005)
        >>> init(jax.random.key(0), (3, 3)).shape
        (3, 3)
    """

    def init(key, shape, dtype=float):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def maxout(
    x: Float[Array, "*batch pieces_features"], pieces: int
) -> Float[Array, "*batch features"]:
    """Maxout over the last axis: the largest of each unit's linear pieces.

    `y_j = max_k x_{k n + j}` for n units and k < pieces.

    Args:
        x: linear pieces; the last axis holds all units of piece 0, then of piece 1, ...
        pieces: number of pieces of a unit, >= 1.

    Returns:
        The units.

    Convention:
        At a tie the gradient is divided evenly among the largest pieces.

    Example:
        >>> import jax.numpy as jnp
        >>> maxout(jnp.array([1.0, 5.0, 3.0, 4.0]), pieces=2).tolist()
        [3.0, 5.0]

    References:
        Goodfellow, Warde-Farley, Mirza, Courville and Bengio, Maxout Networks, ICML
        2013.
    """
    if pieces < 1 or x.shape[-1] % pieces:
        wanted = "the last axis to be a multiple of pieces >= 1"
        got = f"shape {x.shape} and {pieces} pieces"
        do = "Give the preceding linear layer units * pieces features."
        raise Refusal(message("maxout", wanted, got, do))
    # With pieces before units the long axis is last, where vector units are fast.
    return x.reshape(*x.shape[:-1], pieces, -1).max(axis=-2)


class Maxout(nn.Module):
    """`maxout` as a module, so that its output can be a hint."""

    pieces: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch pieces_features"]
    ) -> Float[Array, "*batch features"]:
        """Returns the units."""
        return maxout(x, self.pieces)
