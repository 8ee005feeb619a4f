"""A function that returns its own activations, as a `Network`."""

from collections.abc import Callable, Iterator, Mapping

from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, accepts, form, message
from hintjax.networks.capture import features_of
from hintjax.networks.network import Network, Variables
from hintjax.networks.paths import (
    OUTPUT,
    in_order,
    split_items,
    take,
    traced,
    unknown_path,
)


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
        The network. A path is a key of `hints`, unchanged, or `outer/inner` in nested
        dicts; `[i]` is an entry of a tuple, or one layer that a scan stacked. `:out` is
        the output.

    Raises:
        TypeError: if a function takes other arguments, or, when it is called, if it
            returns anything else.

    >>> import jax
    >>> from hintjax.networks import Wants
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
    accepts("function", ("params", "state", "inputs"), ("train", "key"), apply=apply)
    if init is not None:
        accepts("function", ("key", "inputs"), init=init)
    name = getattr(apply, "__name__", "function")

    def initial(key, inputs):
        if init is None:
            do = "Pass init=, or use variables from elsewhere."
            raise Refusal(message("function", "init", "None", do))
        made = init(key, inputs)
        if not isinstance(made, tuple) or len(made) != 2:
            do = "Return (params, {}) if there is no state."
            wanted = "init to return (params, state)"
            raise WrongType(message("function", wanted, form(made), do))
        return Variables(*made)

    def run(params, state, inputs, train=False, key=None):
        result = apply(params, state, inputs, train=train, key=key)
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != 3 or not isinstance(parts[1], Mapping):
            wanted = f"{name} to return (output, dict of hints, state)"
            got = ", ".join(type(part).__name__ for part in parts)
            raise WrongType(message("function", wanted, f"({got})"))
        output, hints, changed = parts
        return output, {OUTPUT: output, **dict(_flat(hints))}, changed

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
        features = features_of(name, output, hints, params, wants)
        return features, changed if train else state

    def layers(params, state, inputs):
        shapes, origins = traced(shown, params, state, inputs)
        return in_order((path, shapes[path], origins[path]) for path in shapes)

    return Network(initial, apply_, layers)


def _flat(hints: Mapping[str, PyTree], scope: str = "") -> Iterator[tuple[str, PyTree]]:
    """Each hint of nested dicts, with its path."""
    for name, node in hints.items():
        if isinstance(node, Mapping):
            yield from _flat(node, f"{scope}{name}/")
        else:
            yield f"{scope}{name}", node
