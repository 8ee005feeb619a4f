"""Names of activations: one grammar, and the place in a program that makes each one.

A path names one activation::

    group2/block1              the output of the submodule at that scope
    encoder.embed              the output of another method than `__call__`
    shared#1                   the second call of a module called several times
    group2/block1:in           the input of the submodule
    attention[1]               one entry of a tuple
    attention[weights]         one entry of a dict, or one field of a dataclass
    layers/dense[2]            one of the layers that a scan runs
    group2/margin              a value that the module `sow`s as "margin"
    :out                       the output of the whole network
    :out[logits]               one entry of this output

The layers that a scan stacks can also be wanted whole, as `layers/dense`. A scan runs
all its layers, whichever is wanted, and holds their parameters as one array: parameters
above the hint have no gradient but are not frozen.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, message, nearest

OUTPUT = ":out"  # no submodule has this name: the grammar has no ":" in a scope
_GRAMMAR = re.compile(
    r"(?:(?P<scope>[^.#:\[\]]+)"
    r"(?:\.(?P<method>\w+))?(?:#(?P<call>\d+))?(?P<input>:in)?|(?P<output>:out))"
    r"(?P<items>(?:\[\w+\])*)"
)
_ITEM = re.compile(r"\[\w+\]")


class Path(NamedTuple):
    """The parts of the path of one activation.

    Attributes:
        scope: names from the model down to the submodule or the sown value; none for
            the output of the whole network.
        method: the method of the submodule; "" for the output of the whole network.
        call: number of the call, or None for the only call.
        side: ":in" for the input of a submodule, ":out" for the output of the whole
            network, "" for the output of a submodule.
        items: positions in a tuple, or in the layers of a scan; names in a dict.
    """

    scope: tuple[str, ...]
    method: str
    call: int | None
    side: str
    items: tuple[int | str, ...]


def parse_path(path: str) -> Path:
    """Reads a path by the grammar of this module.

    Args:
        path: `scope/name`, then optionally `.method`, `#call`, `:in` and any number
            of `[i]`; or `:out`, and any number of `[i]`.

    Returns:
        The parts.

    Raises:
        ValueError: if the text does not follow the grammar.

    >>> parse_path("group2/block1.embed#0:in[1]")
    Path(scope=('group2', 'block1'), method='embed', call=0, side=':in', items=(1,))
    """
    match = _GRAMMAR.fullmatch(path)
    if match is not None and match["output"]:
        return Path((), "", None, OUTPUT, _items(match["items"]))
    if match is None or not all(match["scope"].split("/")):
        wanted = "scope/name, then .method, #call, :in or [i]; or :out"
        do = "List the paths of a model with `hintjax layers`."
        raise Refusal(message("path", wanted, repr(path), do))
    return Path(
        scope=tuple(match["scope"].split("/")),
        method=match["method"] or "__call__",
        call=None if match["call"] is None else int(match["call"]),
        side=match["input"] or "",
        items=_items(match["items"]),
    )


def _items(text: str) -> tuple[int | str, ...]:
    """The positions and names in `[1][logits]`."""
    found = re.findall(r"\w+", text)
    return tuple(int(item) if item.isdecimal() else item for item in found)


def outermost(path: str) -> bool:
    """Whether a path is that of a network's output, or of an entry of it.

    >>> outermost(":out[0]"), outermost("big/:out"), outermost("big/head")
    (True, True, False)
    """
    return path.rpartition("/")[2].startswith(OUTPUT)


def find_call(
    captured: Mapping[str, Any],
    path: str,
    parsed: Path,
    missing: Callable[[], Exception],
) -> tuple[str | int, ...]:
    """The keys of the value of one call, of a submodule or sown."""
    places: list[tuple[str, ...]] = [(*parsed.scope, parsed.method + parsed.side)]
    if parsed.method == "__call__" and not parsed.side:
        places.append(parsed.scope)
    keys = next((keys for keys in places if _is_value(captured, keys)), None)
    if keys is None:
        raise missing()
    calls = at(captured, keys)
    if not isinstance(calls, tuple):  # sown with its own reduction
        if parsed.call:
            raise missing()
        return keys
    if parsed.call is None and len(calls) > 1:
        first, last = (_written(parsed, call) for call in (0, len(calls) - 1))
        wanted = f"{path!r} to be one activation"
        do = f"Choose one of {first} to {last}."
        raise Refusal(message("hints", wanted, f"{len(calls)} calls", do))
    if (parsed.call or 0) >= len(calls):
        raise missing()
    return *keys, parsed.call or 0


def _is_value(captured: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether the keys lead to a captured value."""
    node = captured
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return not isinstance(node, Mapping)


def take(
    captured: Mapping[str, Any],
    path: str,
    keys: tuple[str | int, ...],
    items: tuple[int | str, ...],
    origins: Callable[[], PyTree],
    missing: Callable[[], Exception],
) -> jax.Array:
    """The array at some keys: an entry, or a layer that scans stacked."""
    value = at(captured, keys)
    while items and (found := entries(value)) is not None:
        item, items = items[0], items[1:]
        keys = (*keys, item)
        if item not in found:
            raise missing()
        value = found[item]
    if any(isinstance(item, str) for item in items):
        raise missing()
    if items:
        # Only the program says whether the first axis is a scan's or the batch.
        stacked = at(origins(), keys).lengths if isinstance(value, jax.Array) else ()
        inside = (i < length for i, length in zip(items, stacked, strict=False))
        if len(items) > len(stacked) or not all(inside):
            raise missing()
        value = value[items]
    if isinstance(value, np.ndarray) and value.dtype.kind in "buifc":
        value = jnp.asarray(value)  # a constant
    if not isinstance(value, jax.Array):
        wanted = f"{path!r} to be an array"
        first = next(iter(entries(value) or {}), 0)
        do = f"Choose an entry with {path}[{first}], or sow the array in the model."
        raise WrongType(message("hints", wanted, type(value).__name__, do))
    return value


def split_items(path: str) -> tuple[str, tuple[int | str, ...]]:
    """Splits `path[1][name]` into the path and the positions and names."""
    scope = re.sub(r"(?:\[\w+\])+\Z", "", path)
    return scope, _items(path[len(scope) :])


def entries(value: Any) -> dict[int | str, Any] | None:
    """The entries of a tuple, dict or dataclass, as a path names them; else None."""
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        return {**dict(enumerate(value)), **dict(zip(names, value, strict=True))}
    if isinstance(value, Mapping):
        named = {f"[{name}]": entry for name, entry in value.items()}
        return {_items(n)[0]: e for n, e in named.items() if _ITEM.fullmatch(n)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names}
    return None


def _written(parsed: Path, call: int) -> str:
    """The path of one call."""
    method = "" if parsed.method == "__call__" else f".{parsed.method}"
    items = "".join(f"[{item}]" for item in parsed.items)
    return f"{'/'.join(parsed.scope)}{method}#{call}{parsed.side}{items}"


def at(tree: Any, keys: tuple[str | int, ...]) -> Any:
    """The node of a tree at some keys: of dicts, or of entries as a path names them."""

    def child(node: Any, key: str | int) -> Any:
        if isinstance(node, Mapping) and key in node:
            return node[key]
        return (entries(node) or {})[key]

    return functools.reduce(child, keys, tree)


def activations(
    tree: Mapping[str, Any],
    methods: set[tuple[tuple[str, ...], str]],
    scope: tuple[str, ...] = (),
) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """The (path, keys) of every call that was captured."""
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from activations(node, methods, (*scope, name))
            continue
        path = "/".join(scope)
        if name != "__call__":
            path += ("." if (scope, name) in methods else "/") + name
        path = path.removeprefix("/")
        if not path or path.startswith("."):  # the network's output is ":out"
            continue
        if not isinstance(node, tuple):
            yield path, (*scope, name)
            continue
        for call in range(len(node)):
            one = path if len(node) == 1 else f"{path}#{call}"
            yield one, (*scope, name, call)


class _Origin(NamedTuple):
    """The place where a program makes a value, and the scans that stack the value.

    Attributes:
        place: number of the equation, then of the equation inside it, and so on; for a
            scan that stacks the value, None stands between for the number of the step.
        lengths: the lengths of the scans that stack the value.
    """

    place: tuple[int | None, ...]
    lengths: tuple[int, ...]


def traced(function: Callable[..., PyTree], *arguments: PyTree) -> tuple[Any, Any]:
    """The shapes of all arrays in a function's result, and their origins."""

    def one(leaf):
        if isinstance(leaf, jax.Array):
            return leaf
        # A dataclass that JAX does not know as a tree is a leaf.
        return jax.tree.map(one, entries(leaf))

    def arrays(*arguments):
        return jax.tree.map(one, function(*arguments))

    program, shapes = jax.make_jaxpr(arrays, return_shape=True)(*arguments)
    origins = _origins(program.jaxpr, program.jaxpr.outvars)
    return shapes, jax.tree.unflatten(jax.tree.structure(shapes), origins)


def _origins(program: Any, values: Sequence[Any]) -> list[_Origin]:
    """The origins of some values of a program (a jaxpr)."""
    makers = {
        id(value): (number, equation, position)
        for number, equation in enumerate(program.eqns)
        for position, value in enumerate(equation.outvars)
    }
    return [_origin(makers.get(id(value))) for value in values]


def _origin(maker: tuple[int, Any, int] | None) -> _Origin:
    """The origin of a value, by the number, equation and position that make it."""
    if maker is None:  # an argument or a constant
        return _Origin((), ())
    number, equation, position = maker
    for inner in equation.params.values():
        inner = getattr(inner, "jaxpr", inner)
        if len(getattr(inner, "outvars", ())) == len(equation.outvars):
            break
    else:
        return _Origin((number,), ())
    value = inner.outvars[position]
    ((place, lengths),) = _origins(inner, [value])
    if equation.primitive.name != "scan":
        return _Origin((number, *place), lengths)
    steps = equation.params["length"]
    if equation.outvars[position].aval.ndim == value.aval.ndim:  # carried to the end
        return _Origin((number, steps, *place), lengths)
    return _Origin((number, None, *place), (steps, *lengths))


def in_order(
    found: Iterable[tuple[str, Any, Any]],
) -> dict[str, jax.ShapeDtypeStruct]:
    """Sorts (path, shape, origin) by place in the program, to {path: shape}.

    The output of the network comes last.
    """

    def order(entry: tuple[str, Any, _Origin]) -> tuple[Any, ...]:
        path, _, origin = entry
        if outermost(path):
            return (True,)
        # If several layers show the same array, the innermost comes first.
        return False, origin.place, -path.count("/")

    each = (entry for one in found for entry in _entries(*one))
    return {path: shape for path, shape, _ in sorted(each, key=order)}


def _entries(path: str, shape: Any, origin: Any) -> Iterator[tuple[str, Any, _Origin]]:
    """Each array of a tuple or a dict, and each layer that a scan stacked."""
    found = entries(shape)
    if found is not None:
        its = entries(origin) or {}
        # A named tuple has every entry by its position and by its name.
        names = range(len(shape)) if isinstance(shape, tuple) else found
        for name in names:
            yield from _entries(f"{path}[{name}]", found[name], its[name])
    elif hasattr(shape, "shape"):
        if not origin.lengths:
            yield path, shape, origin
            return
        at = origin.place.index(None)
        one = jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype)
        for step in range(origin.lengths[0]):
            place = (*origin.place[:at], step, *origin.place[at + 1 :])
            its = _Origin(place, origin.lengths[1:])
            yield from _entries(f"{path}[{step}]", one, its)


def unknown_path(name: str, path: str, known: Iterable[str]) -> Refusal:
    """The error about a path that a model does not have."""
    near = ", ".join(nearest(path, known)) or "none"
    do = f"Nearest: {near}; list them all with `hintjax layers`."
    return Refusal(message(name, "the path of a layer", repr(path), do))


__all__ = ["Path", "parse_path"]
