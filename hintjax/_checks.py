"""Errors at trace time, each one sentence: where, wanted, got, do.

Every check compares shapes or plain numbers, so it costs nothing once compiled. The
first argument is the name of the function that the user called; arrays go by keyword,
so that the message can name them.
"""

import dataclasses
import difflib
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree, ScalarLike

LARGEST_FLOAT = float(np.finfo(np.float32).max)
LARGEST_INT = np.iinfo(np.int32).max
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 80


class Refusal(ValueError):
    """Input that HintJAX cannot work with; one sentence says where and what to do.

    Every check of the library raises a `Refusal`. So a program that passes on input
    from its own users can show the sentence, and let every other error be a defect.

    >>> raise Refusal(message("kd", "temperature to be > 0", "-1"))
    Traceback (most recent call last):
    ...
    hintjax._checks.Refusal: kd: expected temperature to be > 0, got -1.
    """


class WrongType(Refusal, TypeError):
    """A `Refusal` of an argument whose type is wrong."""


class FileRefusal(OSError, Refusal):
    """A `Refusal` of a file or directory that cannot be read or written."""


def message(caller: str, wanted: str, got: str, do: str = "") -> str:
    """Returns the sentence of an error: where, wanted, got, do."""
    return f"{caller}: expected {wanted}, got {got}. {do}".rstrip()


def same_shape(caller: str, *, do: str = "", **arrays: Array) -> None:
    """Raise unless all arrays have one shape: nothing broadcasts by accident."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        wanted = f"{' and '.join(shapes)} to have the same shape"
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise Refusal(message(caller, wanted, got, do))


def same_leading(caller: str, trailing: int, *, do: str = "", **arrays: Array) -> None:
    """Raise unless all arrays agree on all but their `trailing` last axes."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len({shape[: len(shape) - trailing] for shape in shapes.values()}) > 1:
        wanted = f"{' and '.join(shapes)} to agree on all but the last {trailing} axes"
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise Refusal(message(caller, wanted, got, do))


def rank(caller: str, least: int, layout: str, **arrays: Array) -> None:
    """Raise unless every array has at least `least` axes, laid out as `layout`."""
    for name, array in arrays.items():
        if array.ndim < least:
            wanted = f"{name} to have at least {least} axes ({layout})"
            raise Refusal(message(caller, wanted, f"shape {tuple(array.shape)}"))


def labels(
    caller: str, batch: tuple[int, ...] | None, **arrays: Array | np.ndarray
) -> None:
    """Raise unless every array holds one integer per example.

    Without `batch`, the number of examples is free.
    """
    for name, array in arrays.items():
        integers = is_array(array) and jnp.issubdtype(array.dtype, jnp.integer)
        fits = integers and (array.ndim == 1 if batch is None else array.shape == batch)
        if not fits:
            wanted = f"{name} to be integer {'(batch,)' if batch is None else batch}"
            raise Refusal(message(caller, wanted, described(array)))


def key(caller: str, axes: int, *, do: str = "", **keys: Array | np.ndarray) -> None:
    """Raise unless every array holds random keys and has this number of axes."""
    for name, array in keys.items():
        typed = is_array(array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        # Raw keys, of jax.random.PRNGKey, have one more axis, of integers.
        raw = is_array(array) and array.dtype == jnp.uint32 and array.shape[-1:] != ()
        if not (typed or raw) or array.ndim != axes + (not typed):
            wanted = f"{name} to be {'keys' if axes else 'a key'} of jax.random"
            raise WrongType(message(caller, wanted, form(array), do))


def mask(
    caller: str,
    where: Array | np.ndarray | None,
    *shapes: tuple[int, ...],
    name: str = "where",
) -> None:
    """Raise unless `where` is None, or boolean and of one of the shapes."""
    if where is None:
        return
    if not is_array(where) or where.dtype != bool or where.shape not in shapes:
        wanted = f"{name} to be bool {' or '.join(map(str, dict.fromkeys(shapes)))}"
        raise Refusal(message(caller, wanted, described(where)))


def scalar(
    caller: str, wanted: str, holds: Callable[[Any], bool], **values: ScalarLike
) -> None:
    """Raise unless every value is one number and `holds(value)`.

    Traced numbers are let through. A number that is too large for 32 bits is refused.
    """
    for name, value in values.items():
        if not _is_number(value):
            do = "It is one number."
            raise Refusal(message(caller, f"{name} {wanted}", described(value), do))
        if isinstance(value, Tracer):
            continue
        # On the host: while something else is traced, JAX would trace this, too.
        number = np.asarray(value).item() if is_array(value) else value
        most = LARGEST_INT if isinstance(number, int) else LARGEST_FLOAT
        if most < abs(number) < math.inf:
            wanted = f"{name} to fit in 32 bits"
            raise Refusal(message(caller, wanted, described(value)))
        if not holds(number):
            raise Refusal(message(caller, f"{name} {wanted}", f"{value}"))


def positive(caller: str, **values: ScalarLike) -> None:
    """Raise unless every number is finite and > 0; traced numbers are let through."""
    scalar(caller, "to be > 0", lambda value: 0 < value < math.inf, **values)


def not_negative(caller: str, **values: ScalarLike) -> None:
    """Raise unless every number is finite and >= 0; traced numbers are let through."""
    scalar(caller, "to be >= 0", lambda value: 0 <= value < math.inf, **values)


def integer(caller: str, least: int, **values: int) -> None:
    """Raise unless every number is an integer and not below the least."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not least <= value <= LARGEST_INT:
            wanted = f"{name} to be an integer >= {least}"
            wanted += " of 32 bits" if whole and value > LARGEST_INT else ""
            raise Refusal(message(caller, wanted, described(value)))


def positive_int(caller: str, **values: int) -> None:
    """Raise unless every number is an integer >= 1."""
    integer(caller, 1, **values)


def sizes(caller: str, axes: int, **shapes: Sequence[int]) -> None:
    """Raise unless every shape has `axes` axes (any number, if 0), each >= 1."""
    for name, shape in shapes.items():
        known = isinstance(shape, tuple | list) and len(shape) == (axes or len(shape))
        if not known or not all(type(n) is int and n > 0 for n in shape):
            wanted = f"{name} to be a shape{f' of {axes} axes' if axes else ''}"
            raise Refusal(message(caller, wanted, described(shape)))


def instance(
    caller: str, kind: type | tuple[type, ...], do: str = "", /, **values: Any
) -> None:
    """Raise unless every value is of this kind, or one of these kinds."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for name, value in values.items():
        if not isinstance(value, kinds):
            names = ("None" if one is NoneType else one.__name__ for one in kinds)
            wanted = f"{name} to be {' or '.join(names)}"
            raise WrongType(message(caller, wanted, form(value), do))


def function(caller: str, **values: Callable[..., Any]) -> None:
    """Raise unless every value can be called."""
    for name, value in values.items():
        if not callable(value):
            wanted = f"{name} to be a function"
            raise WrongType(message(caller, wanted, described(value)))


def accepts(
    caller: str,
    arguments: Sequence[str],
    names: Sequence[str] = (),
    do: str = "",
    /,
    **values: Callable[..., Any],
) -> None:
    """Raise unless every function can be called with these arguments.

    Args:
        caller: name of the function that the user called.
        arguments: words for the arguments that are passed by position.
        names: names of the arguments that are passed by name.
        do: what to do if a function takes other arguments.
        **values: the functions; one whose parameters are not known is let through.
    """
    function(caller, **values)
    for name, value in values.items():
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):
            continue
        try:
            signature.bind(*arguments, **dict.fromkeys(names))
        except TypeError as error:
            takes = ", ".join((*arguments, *(f"{one}=" for one in names)))
            wanted = f"{name} to take ({takes})"
            raise WrongType(message(caller, wanted, f"{signature}", do)) from error


def _is_number(value: Any) -> bool:
    """Whether it is one real number; not a bool."""
    if is_array(value):
        kinds = jnp.floating, jnp.integer
        real = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        return real and value.ndim == 0
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_array(value: Any) -> bool:
    """Whether it is an array: JAX's, also a traced one, or NumPy's."""
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def on_host(value: Any) -> bool:
    """Whether it is an array whose numbers this process can read.

    A traced array has none, a shape neither, and a part of an array may be elsewhere.
    """
    known = is_array(value) and not isinstance(value, Tracer)
    return known and getattr(value, "is_fully_addressable", True)


def described(value: Any) -> str:
    """The text of a value for a message: an array by its dtype and shape."""
    if is_array(value) and not isinstance(value, np.generic):
        return f"{value.dtype} {tuple(value.shape)}"
    return _SHORT.repr(value)


def form(value: Any) -> str:
    """The text of a value of a wrong form: a container by its kind and its entries.

    >>> form({"image": 1, "label": 2}), form((1, 2)), form(0)
    ("dict with the entries ['image', 'label']", 'tuple of 2 entries', '0')
    """
    kind = type(value).__name__
    if isinstance(value, Mapping):
        names = _SHORT.repr(sorted(map(str, value)))
        return f"{kind} with " + (f"the entries {names}" if value else "no entries")
    fields = getattr(value, "_fields", None)
    if fields is None and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    if fields is not None and not isinstance(value, type):
        return f"{kind} with the fields {_SHORT.repr(list(fields))}"
    if isinstance(value, tuple | list):
        return f"{kind} of {len(value)} entries"
    return described(value)


def needed(caller: str, batch: Mapping[str, PyTree], name: str, do: str = "") -> Any:
    """The array that a batch holds by a name.

    Args:
        caller: name of the function that the user called.
        batch: the batch.
        name: the name of the entry.
        do: what to do if the entry is missing or is no array.

    Returns:
        The entry, an array of JAX or NumPy.

    Raises:
        Refusal: if the batch has no such entry, or the entry is no array.
    """
    found = batch.get(name)
    if found is None:
        wanted = f"{name!r} in the batch"
        raise Refusal(message(caller, wanted, f"{sorted(batch)}", do))
    if not is_array(found):
        wanted = f"{name!r} of the batch to be an array"
        raise WrongType(message(caller, wanted, form(found), do))
    return found


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The n names that look most like `name`, best first.

    >>> nearest("grup2", ["stem", "group1", "group2", "head"], n=2)
    ['group2', 'group1']
    """
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)
