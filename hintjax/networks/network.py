"""The shapes that every model is seen through: `Network`, `Wants`, `Features`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from flax.core import unfreeze
from jaxtyping import Array, PyTree


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


def _sown(tree):
    """Whether a collection holds what `sow` leaves: tuples, one entry a call."""
    if isinstance(tree, Mapping):
        return any(map(_sown, tree.values()))
    return isinstance(tree, tuple)
