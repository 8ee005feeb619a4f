"""A model seen as pure functions that also return the activations asked for.

Every other room sees a model only as a `Network`: `linen` makes one of a Flax
Linen module as it is, without touching the module or its parameters.

A path names one activation::

    group2/block1              the output of the submodule at that scope
    encoder.embed              the output of another method than `__call__`
    shared#1                   the second call of a module called several times
    group2/block1:in           what the submodule was given
    attention[1]               one entry of a tuple
    group2/margin              a value that the module `sow`s as "margin"
"""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
from flax.core import unfreeze
from jaxtyping import Array, Key, PyTree

from hintjax._checks import message, nearest

_COLLECTION = "intermediates"
_GRAMMAR = re.compile(
    r"(?P<scope>[^.#:\[\]]+)"
    r"(?:\.(?P<method>\w+))?(?:#(?P<call>\d+))?(?P<input>:in)?(?:\[(?P<item>\d+)\])?"
)


class Variables(NamedTuple):
    """What a network is made of: its parameters and every other collection."""

    params: PyTree
    state: PyTree


class Wants(NamedTuple):
    """What a method needs to see of one network."""

    output: bool = False
    hints: tuple[str, ...] = ()
    params: tuple[str, ...] = ()


class Features(NamedTuple):
    """What one forward pass shows; nothing that was not wanted is in it."""

    output: PyTree = None
    hints: Mapping[str, Array] = {}
    params: Mapping[str, PyTree] = {}


class Network(NamedTuple):
    """Any model as pure functions on plain pytrees.

    Attributes:
        init: `(key, inputs) -> Variables`.
        apply: `(params, state, inputs, *, wants, train, key=None) -> (Features,
            state)`. With `train=False` the state comes back untouched.
        layers: `(params, state, inputs) -> {path: ShapeDtypeStruct}`, every
            activation that can be wanted, in the order of execution; found by
            tracing, without a single floating-point operation.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Features, PyTree]]
    layers: Callable[..., dict[str, jax.ShapeDtypeStruct]]


class Path(NamedTuple):
    """One activation: whose, of which method and call, which side, which entry."""

    scope: tuple[str, ...]
    method: str
    call: int | None
    side: str
    item: int | None


def parse_path(path: str) -> Path:
    """Reads the one grammar of paths.

    Args:
        path: `scope/name`, then optionally `.method`, `#call`, `:in`, `[i]`.

    Returns:
        The parts.

    Raises:
        ValueError: if the text does not follow the grammar.

    >>> parse_path("group2/block1.embed#0:in[1]")
    Path(scope=('group2', 'block1'), method='embed', call=0, side=':in', item=1)
    """
    match = _GRAMMAR.fullmatch(path)
    if match is None or not all(match["scope"].split("/")):
        raise ValueError(
            f"path: expected scope/name, then .method, #call, :in or [i], got "
            f"{path!r}. List the paths of a model with `hintjax layers`."
        )
    return Path(
        scope=tuple(match["scope"].split("/")),
        method=match["method"] or "__call__",
        call=None if match["call"] is None else int(match["call"]),
        side=match["input"] or "",
        item=None if match["item"] is None else int(match["item"]),
    )


def split(variables: Mapping[str, PyTree]) -> Variables:
    """Flax variables as `Variables`: the collection "params" and all others.

    Args:
        variables: what `module.init` returns.

    Returns:
        `Variables(params, state)`. What a model sows is no state and is left out:
        it would grow with every call.

    >>> split({"params": {"w": 1}, "batch_stats": {"m": 2}})
    Variables(params={'w': 1}, state={'batch_stats': {'m': 2}})
    """
    collections = dict(unfreeze(variables))
    params = collections.pop("params", {})
    state = {name: tree for name, tree in collections.items() if not _sown(tree)}
    return Variables(params, state)


def join(variables: Variables) -> dict[str, PyTree]:
    """`Variables` as what `module.apply` takes; the inverse of `split`."""
    return {"params": variables.params, **variables.state}


def linen(
    module: nn.Module,
    *,
    call: Callable[[nn.Module, PyTree, bool], PyTree] | None = None,
) -> Network:
    """A Flax Linen module as a `Network`.

    Hints are exposed by Linen's own `capture_intermediates` with a filter for the
    paths that are wanted; under jit, whatever does not feed what is returned is
    not computed.

    Args:
        module: the module, unbound.
        call: `(module, inputs, train) -> output`, for a module that is called in
            its own way. By default `module(inputs, train=train)`, or
            `module(inputs)` for a module that takes nothing else.

    Returns:
        The network.

    Raises:
        TypeError: if the module takes other arguments and there is no `call`.

    >>> net = linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
    >>> x = jax.numpy.ones((1, 3))
    >>> params, state = net.init(jax.random.key(0), x)
    >>> list(net.layers(params, state, x))
    ['layers_0', 'layers_2']
    >>> wants = Wants(output=True, hints=("layers_0",))
    >>> features, _ = net.apply(params, state, x, wants=wants, train=False)
    >>> features.output.shape, features.hints["layers_0"].shape
    ((1, 2), (1, 4))
    """
    name = type(module).__name__
    call = call or _default_call(module)

    # Not jitted: equal layers share their compiled operations, and compiling the
    # initialisation of a deep network at once takes five times as long.
    def init(key: Key[Array, ""], inputs: PyTree) -> Variables:
        return split(module.init(key, inputs, False, method=call))

    def run(params, state, inputs, train, key, capture, sow_inputs=frozenset()):
        collections = [*(state if train else ()), *([_COLLECTION] if capture else ())]
        with nn.intercept_methods(_sowing(sow_inputs)):
            output, changed = module.apply(
                {"params": params, **state},
                inputs,
                train,
                method=call,
                rngs=key,
                mutable=collections,
                capture_intermediates=capture,
            )
        return output, dict(changed)

    def apply(params, state, inputs, *, wants, train, key=None):
        paths = {path: parse_path(path) for path in wants.hints}
        kept = {(p.scope, p.method) for p in paths.values() if not p.side}
        given = {(p.scope, p.method) for p in paths.values() if p.side}
        # A filter even where only sown values are wanted: it opens the collection.
        capture = bool(paths) and (lambda m, method: (m.path, method) in kept)
        output, changed = run(params, state, inputs, train, key, capture, given)
        captured = changed.pop(_COLLECTION, {})

        def missing(path):
            return _unknown(name, path, layers(params, state, inputs))

        hints = {path: _pick(captured, path, p, missing) for path, p in paths.items()}
        features = Features(
            output=output if wants.output else None,
            hints=hints,
            params={path: _subtree(params, path, name) for path in wants.params},
        )
        return features, {**state, **changed}

    def layers(params, state, inputs):
        ended = {}  # when each call of each submodule ended
        clock = itertools.count()

        def note(call_next, args, kwargs, context):
            result = call_next(*args, **kwargs)
            if context.method_name == "__call__":
                ended.setdefault(context.module.path, []).append(next(clock))
            return result

        def trace(params, state, inputs):
            with nn.intercept_methods(note):
                return run(params, state, inputs, False, jax.random.key(0), True)[1]

        captured = jax.eval_shape(trace, params, state, inputs)
        found = dict(_named_activations(captured.get(_COLLECTION, {})))

        def when(path):
            scope, call = parse_path(path).scope, parse_path(path).call or 0
            # A sown value comes with the module that sowed it.
            calls = ended.get(scope) or ended.get(scope[:-1]) or [math.inf]
            return calls[min(call, len(calls) - 1)]

        return {path: found[path] for path in sorted(found, key=when)}

    return Network(init, apply, layers)


def _sown(tree):
    """Whether a collection holds what `sow` leaves: tuples, one entry a call."""
    if isinstance(tree, Mapping):
        return any(map(_sown, tree.values()))
    return isinstance(tree, tuple)


def _default_call(module):
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    names = [p.name for p in parameters]
    if "train" in names:
        return lambda bound, inputs, train: bound(inputs, train=train)
    kinds = [p.kind for p in parameters]
    if len(names) == 1 or kinds[:1] == [inspect.Parameter.VAR_POSITIONAL]:
        return lambda bound, inputs, train: bound(inputs)
    raise TypeError(
        f"linen: expected {type(module).__name__}.__call__ to take the inputs alone or "
        f"the inputs and train=, got ({', '.join(names)}). Say how it is called, e.g. "
        f"call=lambda module, x, train: module(x, deterministic=not train)."
    )


def _sowing(wanted):
    """An interceptor that sows what the wanted submodules were given."""

    def sow(call_next, args, kwargs, context):
        if (context.module.path, context.method_name) in wanted:
            given = (*args, *kwargs.values())
            value = given[0] if len(given) == 1 else given
            context.module.sow(_COLLECTION, context.method_name + ":in", value)
        return call_next(*args, **kwargs)

    return sow


def _pick(captured, path, parsed, missing):
    calls = _calls(captured, parsed)
    if calls is None:
        raise missing(path)
    if parsed.call is None and len(calls) > 1:
        first, last = (_written(parsed, call) for call in (0, len(calls) - 1))
        raise ValueError(
            f"hints: expected {path!r} to be one activation, got {len(calls)} calls. "
            f"Choose one of {first} to {last}."
        )
    if (parsed.call or 0) >= len(calls):
        raise missing(path)
    value = calls[parsed.call or 0]
    if parsed.item is not None:
        if not isinstance(value, (tuple, list)) or parsed.item >= len(value):
            raise missing(path)
        value = value[parsed.item]
    if not isinstance(value, jax.Array):
        raise TypeError(
            f"hints: expected {path!r} to be an array, got {type(value).__name__}. "
            f"Choose an entry of a tuple with {path}[0], or sow the array in the model."
        )
    return value


def _written(parsed, call):
    """The path of one call."""
    method = "" if parsed.method == "__call__" else f".{parsed.method}"
    item = "" if parsed.item is None else f"[{parsed.item}]"
    return f"{'/'.join(parsed.scope)}{method}#{call}{parsed.side}{item}"


def _calls(captured, parsed):
    """All values recorded for a path: a submodule's calls, or a sown value."""
    scopes = [(*parsed.scope, parsed.method + parsed.side)]
    if parsed.method == "__call__" and not parsed.side:
        scopes.append(parsed.scope)
    for scope in scopes:
        node = captured
        for part in scope:
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, tuple):
            return node
    return None


def _named_activations(tree, scope=()):
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _named_activations(node, (*scope, name))
            continue
        path = "/".join(scope if name == "__call__" else (*scope, name))
        if not path:  # the whole model: that is the output, not a hint
            continue
        for number, value in enumerate(node):
            one = path if len(node) == 1 else f"{path}#{number}"
            items = {one: value}
            if isinstance(value, (tuple, list)):
                items = {f"{one}[{i}]": item for i, item in enumerate(value)}
            yield from (
                (p, item) for p, item in items.items() if hasattr(item, "shape")
            )


def _subtree(params, path, name):
    node = params
    for part in path.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            raise _unknown(name, path, _prefixes(params))
        node = node[part]
    return node


def _prefixes(tree, scope=""):
    for name, node in tree.items():
        yield scope + name
        if isinstance(node, Mapping):
            yield from _prefixes(node, f"{scope}{name}/")


def _unknown(name: str, path: str, known: Iterable[str]) -> ValueError:
    near = ", ".join(nearest(path, known)) or "none"
    do = f"Nearest: {near}; list them all with `hintjax layers`."
    return ValueError(message(name, "the path of a layer", repr(path), do))


__all__ = [
    "Features",
    "Network",
    "Path",
    "Variables",
    "Wants",
    "join",
    "linen",
    "parse_path",
    "split",
]
