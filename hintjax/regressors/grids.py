"""Tokens as feature maps, and feature maps as tokens."""

import math

from jaxtyping import Array, Float

from hintjax._checks import Refusal, described, instance, is_array, message, sizes


def to_grid(
    tokens: Float[Array, "batch n c"],
    *,
    drop: int = 0,
    size: tuple[int, int] | None = None,
) -> Float[Array, "batch h w c"]:
    """Tokens as a map, in reading order, without the first `drop` of them.

    Args:
        tokens: of patches, behind the class tokens.
        drop: how many class tokens there are: 1 for a ViT, 2 with DeiT's distillation
            token.
        size: height and width of the grid; by default it is square.

    Returns:
        The map.

    Raises:
        ValueError: if what is left does not form the grid.

    >>> import jax
    >>> to_grid(jax.numpy.zeros((2, 1 + 7 * 7, 8)), drop=1).shape
    (2, 7, 7, 8)
    """
    where = "regressors.to_grid"
    if not is_array(tokens) or tokens.ndim != 3:
        got = described(tokens)
        do = "Name a layer whose output is a sequence of tokens."
        raise Refusal(message(where, "tokens (batch, n, c)", got, do))
    instance(where, int, drop=drop)
    if size is not None:
        sizes(where, 2, size=size)
    size = grid_of(where, tokens.shape[1], drop, "drop", size)
    return tokens[:, drop:].reshape(tokens.shape[0], *size, tokens.shape[2])


def to_tokens(maps: Float[Array, "batch h w c"]) -> Float[Array, "batch n c"]:
    """A map as tokens, in reading order: the inverse of `to_grid`.

    Args:
        maps: the map.

    Returns:
        Its n = h w positions as tokens.

    Raises:
        ValueError: if it is no map.

    >>> import jax
    >>> to_tokens(jax.numpy.zeros((2, 7, 7, 8))).shape
    (2, 49, 8)
    """
    if not is_array(maps) or maps.ndim != 4:
        do = "Name a layer whose output is a map."
        got = described(maps)
        raise Refusal(message("regressors.to_tokens", "maps (batch, h, w, c)", got, do))
    batch, height, width, channels = maps.shape
    return maps.reshape(batch, height * width, channels)


def grid_of(
    where: str, tokens: int, aside: int, name: str, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width of the grid of all tokens but the first `aside`."""
    if not 0 <= aside < tokens:
        wanted = f"{name} from 0 to less than the {tokens} tokens"
        raise Refusal(message(where, wanted, f"{aside}"))
    left = tokens - aside
    height, width = size or 2 * (math.isqrt(left),)
    if height * width != left:
        wanted = f"a grid of {height}x{width}" if size else "tokens on a square grid"
        got = f"{tokens} tokens with {name}={aside}"
        more = tokens - height * width
        do = f"{name}={more} leaves {height}x{width}"
        if size is None:
            do += "; for a grid that is not square, regressors.to_grid takes its size"
        elif more < 0:
            do = "Give the size of its grid"
        raise Refusal(message(where, wanted, got, f"{do}."))
    return height, width


def same_positions(
    where: str, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    """Raise unless both shapes have the same axes but for the channels."""
    check_shapes(where, student, teacher)
    if student[:-1] != teacher[:-1]:
        ways = {
            (3, 3): "regressors.conv between maps of unequal size",
            (2, 2): "regressors.resampled between unequal numbers of tokens",
        }
        view = "regressors.to_grid, with hintjax.viewed, to see tokens as a map"
        got = f"student {student} and teacher {teacher}"
        do = f"Use {ways.get((len(student), len(teacher)), view)}."
        raise Refusal(message(where, "the same positions", got, do))


def check_shapes(
    where: str, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    """Raise unless both are shapes of arrays."""
    sizes(where, 0, student=student, teacher=teacher)
