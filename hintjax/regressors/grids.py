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
        tokens: the class tokens, then the tokens of the patches.
        drop: the number of class tokens: 1 for a ViT, 2 with DeiT's distillation
            token.
        size: height and width of the grid; by default it is square.

    Returns:
        The map.

    Raises:
        ValueError: if the remaining tokens do not fill the grid.

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
        The n = h w positions of the map as tokens.

    Raises:
        ValueError: if `maps` has other axes.

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
    """Height and width of the grid of all tokens except the first `aside`.

    Args:
        where: the caller, for the message.
        tokens: the number of all tokens.
        aside: the number of tokens before the grid.
        name: the caller's name for `aside`.
        size: the expected height and width; by default the grid is square.
    """
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
            do += "; if the grid is not square, pass its size to regressors.to_grid"
        elif more < 0:
            do = "Pass the size of the grid"
        raise Refusal(message(where, wanted, got, f"{do}."))
    return height, width


def same_positions(
    where: str, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    """Raise unless both shapes are equal in all axes except the channels."""
    check_shapes(where, student, teacher)
    if student[:-1] != teacher[:-1]:
        ways = {
            (3, 3): "regressors.conv between maps of unequal size",
            (2, 2): "regressors.resampled between unequal numbers of tokens",
        }
        view = "hintjax.viewed with regressors.to_grid to view tokens as a map"
        got = f"student {student} and teacher {teacher}"
        do = f"Use {ways.get((len(student), len(teacher)), view)}."
        raise Refusal(message(where, "the same positions", got, do))


def check_shapes(
    where: str, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    """Raise unless both are shapes of arrays."""
    sizes(where, 0, student=student, teacher=teacher)
