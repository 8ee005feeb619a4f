"""How well one layer explains another: R^2 of the best linear map."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax._checks import Refusal, WrongType, described, message, rank, same_leading
from hintjax._numerics import adaptive_average_pool, as_float
from hintjax.methods import explained_variance


def linearly_explained(
    fit: tuple[Float[Array, "n ..."], Float[Array, "n ..."]],
    on: tuple[Float[Array, "m ..."], Float[Array, "m ..."]],
) -> Float[Array, ""]:
    """R^2 of the best linear map from the guided layer's channels to the hint's.

    It measures how much of the hint a student's layer contains, for any training
    method. Least squares finds the map on one set of examples, and R^2 is computed on
    another set. Feature maps of unequal size are average-pooled to the smaller size
    first.

    Args:
        fit: (guided, hint) activations for the least squares.
        on: (guided, hint) activations for R^2.

    Returns:
        `1 - sum (t - p)^2 / sum (t - mean t)^2`; 0 for a hint that does not vary.

    >>> import jax
    >>> s = jax.random.normal(jax.random.key(0), (8, 3))
    >>> t = s @ jnp.ones((3, 5)) + 1
    >>> round(float(linearly_explained((s, t), (s, t))), 4)
    1.0
    """
    caller = "linearly_explained"
    for name, pair in {"fit": fit, "on": on}.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            wanted = f"{name} to be (guided, hint) activations"
            raise WrongType(message(caller, wanted, described(pair)))
    pairs = [as_float(caller, *pair) for pair in (fit, on)]
    for guided, hint in pairs:
        rank(caller, 2, "n ...", guided=guided, hint=hint)
    (guided, hint), (new_guided, new_hint) = (_rows(*pair) for pair in pairs)
    same_leading(caller, 1, guided=guided, hint=hint)
    same_leading(caller, 1, guided=new_guided, hint=new_hint)
    if guided.shape[-1] != new_guided.shape[-1] or hint.shape[-1] != new_hint.shape[-1]:
        got = f"{[tuple(x.shape for x in pair) for pair in (fit, on)]}"
        raise Refusal(message(caller, "the same channels in both sets", got))
    solution, *_ = jnp.linalg.lstsq(guided, hint)
    return explained_variance(new_guided @ solution, new_hint)


def _rows(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Positions as rows, at one resolution; guided rows get a column of ones."""
    if guided.ndim == hint.ndim == 4:
        height, width = map(min, guided.shape[1:3], hint.shape[1:3])
        size = height, width
        guided, hint = (adaptive_average_pool(x, size) for x in (guided, hint))
    guided = guided.reshape(-1, guided.shape[-1])
    ones = jnp.ones_like(guided[:, :1])
    return jnp.concatenate([guided, ones], 1), hint.reshape(-1, hint.shape[-1])
