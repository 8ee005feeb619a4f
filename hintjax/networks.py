"""A model seen as pure functions that also return the activations asked for.

Every other room sees a model only as a `Network`: `linen` makes one of a Flax
Linen module as it is, without touching the module or its parameters; `nnx` (in
`networks_nnx`) of a Flax NNX model; `function` of any function that returns its own
activations.

How a path names an activation is in `paths`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.core import unfreeze
from jaxtyping import Array, Key, PyTree

from hintjax._checks import message
from hintjax.paths import (
    activations,
    at,
    find_call,
    in_order,
    parse_path,
    split_items,
    take,
    traced,
    unknown_path,
)

_COLLECTION = "intermediates"


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
        layers: `(params, state, inputs) -> {path: ShapeDtypeStruct}`, the output
            of every layer and every sown value, in the order of execution; found by
            tracing, without a single floating-point operation.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Features, PyTree]]
    layers: Callable[..., dict[str, jax.ShapeDtypeStruct]]


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
    call = call or default_call("linen", module)

    # Not jitted: equal layers share their compiled operations, and compiling the
    # initialisation of a deep network at once takes five times as long.
    def init(key: Key[Array, ""], inputs: PyTree) -> Variables:
        return split(module.init(key, inputs, False, method=call))

    def run(params, state, inputs, train, key, watch, given):
        collections = [*(state if train else ()), *([_COLLECTION] if watch else ())]
        with nn.intercept_methods(_sowing(given)):
            output, changed = module.apply(
                {"params": params, **state},
                inputs,
                train,
                method=call,
                rngs=key,
                mutable=collections,
                # A filter even where only sown values are wanted: it opens the
                # collection.
                capture_intermediates=watch and (lambda m, name: watch(m.path, name)),
            )
        changed = dict(changed)
        captured = changed.pop(_COLLECTION, {})
        return output, captured, {**state, **changed}

    do = "Give nn.scan or nn.vmap variable_axes={'intermediates': 0}."
    return watched(type(module).__name__, init, run, hidden=do)


def function(
    apply: Callable[..., tuple[PyTree, Mapping[str, PyTree], PyTree]],
    *,
    init: Callable[..., tuple[PyTree, PyTree]] | None = None,
) -> Network:
    """Any function as a `Network`: Equinox, Haiku, a model written by hand.

    Args:
        apply: `(params, state, inputs, train=, key=) -> (output, hints, state)`, with
            arrays (or nested dicts and tuples of them) in the dict `hints`; `params`
            and `state` are any pytrees of arrays. The key is None in evaluation.
            Under jit, hints that are not wanted are not computed.
        init: `(key, inputs) -> (params, state)`; without it, the network is used
            with variables from elsewhere.

    Returns:
        The network. A path is a key of `hints` as it is, `outer/inner` in nested
        dicts; `[i]` is an entry of a tuple, or one layer of what a scan stacked.

    Raises:
        TypeError: when it is applied, if `apply` returns anything else.

    >>> def apply(params, state, x, train, key):
    ...     hidden = jax.nn.relu(x @ params["in"])
    ...     return hidden @ params["out"], {"hidden": hidden}, state
    >>> net = function(apply)
    >>> params = {"in": jax.numpy.ones((3, 4)), "out": jax.numpy.ones((4, 2))}
    >>> x = jax.numpy.ones((1, 3))
    >>> net.layers(params, {}, x)["hidden"].shape
    (1, 4)
    >>> wants = Wants(hints=("hidden",))
    >>> features, _ = net.apply(params, {}, x, wants=wants, train=False)
    >>> features.hints["hidden"].shape
    (1, 4)
    """
    name = getattr(apply, "__name__", "function")

    def initial(key, inputs):
        if init is None:
            do = "Pass init=, or use variables from elsewhere."
            raise ValueError(message("function", "init", "None", do))
        return Variables(*init(key, inputs))

    def run(params, state, inputs, train=False, key=None):
        result = apply(params, state, inputs, train=train, key=key)
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != 3 or not isinstance(parts[1], Mapping):
            wanted = f"{name} to return (output, dict of hints, state)"
            got = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(message("function", wanted, f"({got})"))
        output, hints, changed = parts
        return output, dict(_flat(hints)), changed

    def shown(params, state, inputs):
        return run(params, state, inputs)[1]

    def apply_(params, state, inputs, *, wants, train, key=None):
        output, captured, changed = run(params, state, inputs, train, key)

        def pick(path):
            def missing():
                return unknown_path(name, path, layers(params, state, inputs))

            def origins():
                return traced(shown, params, state, inputs)[1]

            known = path in captured
            scope, items = (path, ()) if known else split_items(path)
            if scope not in captured:
                raise missing()
            return take(captured, path, (scope,), items, origins, missing)

        hints = {path: pick(path) for path in wants.hints}
        features = _features(name, output, hints, params, wants)
        return features, changed if train else state

    def layers(params, state, inputs):
        shapes, origins = traced(shown, params, state, inputs)
        return in_order((path, shapes[path], origins[path]) for path in shapes)

    return Network(initial, apply_, layers)


def watched(
    name: str, init: Callable[..., Variables], run: Callable[..., Any], hidden: str
) -> Network:
    """A network of modules, whose activations have paths.

    Args:
        name: of the model, for errors.
        init: `Network.init`.
        run: `(params, state, inputs, train, key, watch, given) -> (output, captured,
            state)`. `watch(scope, method)` says whose outputs are captured, the set
            `given` whose inputs; captured is a nested dict by scope, of tuples with
            an entry for each call, by "method" or "method:in". With `watch=False`
            nothing is.
        hidden: what to do about a module that is there while nothing is captured.

    Returns:
        The network.
    """

    def apply(params, state, inputs, *, wants, train, key=None):
        paths = {path: parse_path(path) for path in wants.hints}
        kept = {(p.scope, p.method) for p in paths.values() if not p.side}
        given = {(p.scope, p.method) for p in paths.values() if p.side}
        watch = bool(paths) and (lambda scope, method: (scope, method) in kept)

        def ran(params, state, inputs):
            return run(params, state, inputs, train, key, watch, given)

        output, captured, changed = ran(params, state, inputs)

        @functools.cache
        def origins():
            return traced(lambda *parts: ran(*parts)[1], params, state, inputs)[1]

        def pick(path, parsed):
            def missing():
                return unknown(path, parsed, params, state, inputs)

            keys = find_call(captured, path, parsed, missing)
            return take(captured, path, keys, parsed.items, origins, missing)

        hints = {path: pick(path, parsed) for path, parsed in paths.items()}
        features = _features(name, output, hints, params, wants)
        return features, changed if train else state

    def listed(params, state, inputs, methods):
        """All activations, and of which modules' methods there could be any."""
        seen = set()

        def watch(scope, method):
            if methods(method):
                seen.add((scope, method))
            return methods(method)

        def captured(params, state, inputs):
            key = jax.random.key(0)
            return run(params, state, inputs, False, key, watch, set())[1]

        shapes, origins = traced(captured, params, state, inputs)
        found = (
            (path, at(shapes, keys), at(origins, keys))
            for path, keys in activations(shapes, seen)
        )
        return in_order(found), seen

    def unknown(path, parsed, params, state, inputs):
        known, seen = listed(params, state, inputs, _public)
        one = (parsed.scope, parsed.method)
        if one in seen and one not in {parse_path(k)[:2] for k in known}:
            wanted = f"{path!r} to show an activation"
            return ValueError(message(name, wanted, "a module that shows none", hidden))
        return unknown_path(name, path, known)

    def layers(params, state, inputs):
        return listed(params, state, inputs, lambda method: method == "__call__")[0]

    return Network(init, apply, layers)


def default_call(where: str, module: Any) -> Callable[[Any, PyTree, bool], PyTree]:
    """How a module is called that takes the inputs, and maybe `train`."""
    name = type(module).__name__
    if not callable(module):
        do = (
            "Say how it is called, e.g. call=lambda module, x, train: module.encode(x)."
        )
        raise TypeError(message(where, f"{name} to have __call__", "none", do))
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    names = [p.name for p in parameters]
    if "train" in names:
        return lambda bound, inputs, train: bound(inputs, train=train)
    kinds = [p.kind for p in parameters]
    if len(names) == 1 or kinds[:1] == [inspect.Parameter.VAR_POSITIONAL]:
        return lambda bound, inputs, train: bound(inputs)
    raise TypeError(
        f"{where}: expected {name}.__call__ to take the inputs alone or the inputs and "
        f"train=, got ({', '.join(names)}). Say how it is called, e.g. "
        f"call=lambda module, x, train: module(x, deterministic=not train)."
    )


def _sown(tree):
    """Whether a collection holds what `sow` leaves: tuples, one entry a call."""
    if isinstance(tree, Mapping):
        return any(map(_sown, tree.values()))
    return isinstance(tree, tuple)


def _sowing(wanted):
    """An interceptor that sows what the wanted submodules were given."""

    def sow(call_next, args, kwargs, context):
        if (context.module.path, context.method_name) in wanted:
            given = (*args, *kwargs.values())
            value = given[0] if len(given) == 1 else given
            context.module.sow(_COLLECTION, context.method_name + ":in", value)
        return call_next(*args, **kwargs)

    return sow


def _public(method: str) -> bool:
    return method == "__call__" or not (method.startswith("_") or method == "setup")


def _flat(hints, scope=""):
    for name, node in hints.items():
        if isinstance(node, Mapping):
            yield from _flat(node, f"{scope}{name}/")
        else:
            yield f"{scope}{name}", node


def _features(name, output, hints, params, wants):
    params = nn.unbox(params)  # methods see arrays, whatever their axes are named
    return Features(
        output=output if wants.output else None,
        hints=hints,
        params={path: _subtree(params, path, name) for path in wants.params},
    )


def _subtree(params, path, name):
    node = params
    for part in path.split("/"):
        children = _children(node)
        if part not in children:
            raise unknown_path(name, path, _prefixes(params))
        node = children[part]
    return node


def _children(node):
    """What is directly below a node of any pytree, by name."""
    below = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    return {
        jax.tree_util.keystr(keys, simple=True): child
        for keys, child in below[0]
        if keys
    }


def _prefixes(tree, scope=""):
    for name, node in _children(tree).items():
        yield scope + name
        yield from _prefixes(node, f"{scope}{name}/")


__all__ = [
    "Features",
    "Network",
    "Variables",
    "Wants",
    "function",
    "join",
    "linen",
    "split",
]
