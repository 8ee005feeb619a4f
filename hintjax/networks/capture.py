"""Networks of modules: wanted activations are picked by path."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, form, is_array, message
from hintjax.networks.network import Features, Network, Variables, Wants
from hintjax.networks.paths import (
    OUTPUT,
    activations,
    at,
    entries,
    find_call,
    in_order,
    parse_path,
    take,
    traced,
    unknown_path,
)


def watched(
    name: str, init: Callable[..., Variables], run: Callable[..., Any], hidden: str
) -> Network:
    """A network of modules, whose activations have paths.

    Args:
        name: name of the model, for errors.
        init: `Network.init`.
        run: `(params, state, inputs, train, key, watch, given) -> (output, captured,
            state)`. `watch(scope, method)` says whether the outputs of a method are
            captured; the set `given` holds the (scope, method) whose inputs are
            captured. `captured` is a nested dict by scope, then by "method" or
            "method:in", of tuples with one entry per call. With `watch=False` nothing
            is captured.
        hidden: advice for a module that exists, but of which nothing is captured.

    Returns:
        The network.
    """

    def apply(params, state, inputs, *, wants, train, key=None):
        paths = {path: parse_path(path) for path in wants.hints}
        kept = {(p.scope, p.method) for p in paths.values() if not p.side}
        given = {(p.scope, p.method) for p in paths.values() if p.side}
        watch = bool(paths) and (lambda scope, method: (scope, method) in kept)

        def ran(params, state, inputs):
            return with_output(run(params, state, inputs, train, key, watch, given))

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
        features = features_of(name, output, hints, params, wants)
        return features, changed if train else state

    def listed(params, state, inputs, methods):
        """All activations, and the (scope, method) that could have activations."""
        seen = set()

        def watch(scope, method):
            if methods(method):
                seen.add((scope, method))
            return methods(method)

        def captured(params, state, inputs):
            key = jax.random.key(0)
            return with_output(run(params, state, inputs, False, key, watch, set()))[1]

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
            return Refusal(message(name, wanted, "a module that shows none", hidden))
        return unknown_path(name, path, known)

    def layers(params, state, inputs):
        return listed(params, state, inputs, lambda method: method == "__call__")[0]

    return Network(init, apply, layers)


def with_output(
    ran: tuple[PyTree, Mapping[str, Any], PyTree],
) -> tuple[PyTree, dict[str, Any], PyTree]:
    """The result of `run`, where the output of the whole network is captured, too."""
    output, captured, changed = ran
    return output, {**captured, OUTPUT: (output,)}, changed


def default_call(where: str, module: Any) -> Callable[[Any, PyTree, bool], PyTree]:
    """The call of a module that takes the inputs, and maybe `train`."""
    name = type(module).__name__
    if not callable(module):
        do = (
            "Say how it is called, e.g. call=lambda module, x, train: module.encode(x)."
        )
        raise WrongType(message(where, f"{name} to have __call__", "none", do))
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    names = [p.name for p in parameters]
    if "train" in names:
        return lambda bound, inputs, train: bound(inputs, train=train)
    kinds = [p.kind for p in parameters]
    if len(names) == 1 or kinds[:1] == [inspect.Parameter.VAR_POSITIONAL]:
        return lambda bound, inputs, train: bound(inputs)
    wanted = f"{name}.__call__ to take the inputs alone or the inputs and train="
    do = (
        "Say how it is called, e.g. "
        "call=lambda module, x, train: module(x, deterministic=not train)."
    )
    raise WrongType(message(where, wanted, f"({', '.join(names)})", do))


def _public(method: str) -> bool:
    """Whether the outputs of a method can have a path."""
    return method == "__call__" or not (method.startswith("_") or method == "setup")


def features_of(
    name: str,
    output: PyTree,
    hints: Mapping[str, Any],
    params: PyTree,
    wants: Wants,
) -> Features:
    """The output, hints and parameters of one pass that are wanted."""
    if wants.output:
        _check_output(name, output)
    params = nn.unbox(params)  # methods see arrays, without the names of their axes
    return Features(
        output=output if wants.output else None,
        hints=hints,
        params={path: _subtree(params, path, name) for path in wants.params},
    )


def _check_output(name: str, output: PyTree) -> None:
    """Raises unless an output is a tree of arrays, which JAX's transforms can pass."""
    for leaf in jax.tree.leaves(output):
        if not (is_array(leaf) or isinstance(leaf, int | float | complex)):
            first = next(iter(entries(leaf) or {}), "logits")
            do = (
                f"Return the arrays alone, e.g. "
                f"call=lambda module, x, train: module(x).{first}, or choose one with "
                f"at_head(method, student=':out[{first}]')."
            )
            wanted = (
                "the output of the network to be arrays, or a tuple or dict of them"
            )
            raise WrongType(message(name, wanted, form(leaf), do))


def _subtree(params: PyTree, path: str, name: str) -> PyTree:
    """The parameters below a path."""
    node = params
    for part in path.split("/"):
        children = _children(node)
        if part not in children:
            raise unknown_path(name, path, _prefixes(params))
        node = children[part]
    return node


def _children(node: PyTree) -> dict[str, PyTree]:
    """The children of a node of any pytree, by name."""
    below = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    return {
        jax.tree_util.keystr(keys, simple=True): child
        for keys, child in below[0]
        if keys
    }


def _prefixes(tree: PyTree, scope: str = "") -> Iterator[str]:
    """The paths of all nodes of a tree."""
    for name, node in _children(tree).items():
        yield scope + name
        yield from _prefixes(node, f"{scope}{name}/")
