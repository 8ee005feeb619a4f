"""Errors at trace time, each one sentence: where, wanted, got, do.

Every check compares shapes or plain numbers, so it costs nothing once compiled. The
first argument is the name of the function that the user called; arrays go by keyword,
so that the message can name them.
"""

import difflib
import math
from collections.abc import Iterable

import jax
from jaxtyping import Array, ScalarLike


def message(caller: str, wanted: str, got: str, do: str = "") -> str:
    """The sentence that every error of the library is."""
    return f"{caller}: expected {wanted}, got {got}. {do}".rstrip()


def same_shape(caller: str, *, do: str = "", **arrays: Array) -> None:
    """Raise unless all arrays have one shape: nothing broadcasts by accident."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        wanted = f"{' and '.join(shapes)} to have the same shape"
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(message(caller, wanted, got, do))


def same_leading(caller: str, trailing: int, *, do: str = "", **arrays: Array) -> None:
    """Raise unless all arrays agree on all but their `trailing` last axes."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len({shape[: len(shape) - trailing] for shape in shapes.values()}) > 1:
        wanted = f"{' and '.join(shapes)} to agree on all but the last {trailing} axes"
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(message(caller, wanted, got, do))


def rank(caller: str, least: int, layout: str, **arrays: Array) -> None:
    """Raise unless every array has at least `least` axes, laid out as `layout`."""
    for name, array in arrays.items():
        if array.ndim < least:
            wanted = f"{name} to have at least {least} axes ({layout})"
            raise ValueError(message(caller, wanted, f"shape {tuple(array.shape)}"))


def mask(caller: str, where: Array | None, *shapes: tuple[int, ...]) -> None:
    """Raise unless `where` is None, or boolean and of one of the shapes."""
    if where is None:
        return
    if where.dtype != bool or where.shape not in shapes:
        wanted = f"where to be bool {' or '.join(map(str, dict.fromkeys(shapes)))}"
        got = f"{where.dtype} {where.shape}"
        raise ValueError(message(caller, wanted, got))


def positive(caller: str, **values: ScalarLike) -> None:
    """Raise unless every number is finite and > 0; traced numbers are let through."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 < value < math.inf:
            raise ValueError(message(caller, f"{name} to be > 0", f"{value}"))


def positive_int(caller: str, **values: int) -> None:
    """Raise unless every number is an integer >= 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            wanted = f"{name} to be an integer >= 1"
            raise ValueError(message(caller, wanted, f"{value!r}"))


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The n names that look most like `name`, best first.

    >>> nearest("grup2", ["stem", "group1", "group2", "head"], n=2)
    ['group2', 'group1']
    """
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)
