"""The types that describe every model: `Network`, `Wants`, `Features`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax.core import unfreeze
from jaxtyping import Array, PyTree

from hintjax._checks import WrongType, form, message


class Variables(NamedTuple):
    """The parameters of a network, and its state: every other collection."""

    params: PyTree
    state: PyTree


class Wants(NamedTuple):
    """The parts of one network that a method needs.

    Attributes:
        output: whether the output is needed.
        hints: paths of activations.
        params: paths of parameters.
    """

    output: bool = False
    hints: tuple[str, ...] = ()
    params: tuple[str, ...] = ()


class Features(NamedTuple):
    """The result of one forward pass; it holds only the parts that are wanted.

    Attributes:
        output: the output, or None.
        hints: the activations by path.
        params: the parameters by path.
    """

    output: PyTree = None
    hints: Mapping[str, Array] = {}
    params: Mapping[str, PyTree] = {}


class Network(NamedTuple):
    """Any model as pure functions on plain pytrees.

    Attributes:
        init: `(key, inputs) -> Variables`.
        apply: `(params, state, inputs, *, wants, train, key=None) -> (Features,
            state)`. With `train=False` it returns the state unchanged.
        layers: `(params, state, inputs) -> {path: ShapeDtypeStruct}`, the output
            of every layer and every sown value, in the order of execution, and last
            the output of the network, ":out"; found by tracing, without a single
            floating-point operation.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Features, PyTree]]
    layers: Callable[..., dict[str, jax.ShapeDtypeStruct]]


def split(variables: Mapping[str, PyTree]) -> Variables:
    """Flax variables as `Variables`: the collection "params" and all others.

    Args:
        variables: the result of `module.init`.

    Returns:
        `Variables(params, state)`, without the values that a model sows: they are not
        state, and they would grow with every call.

    >>> split({"params": {"w": 1}, "batch_stats": {"m": 2}})
    Variables(params={'w': 1}, state={'batch_stats': {'m': 2}})
    """
    collections = unfreeze(dict(variables))
    params = collections.pop("params", {})
    state = {name: tree for name, tree in collections.items() if not _sown(tree)}
    return Variables(params, state)


def read_variables(caller: str, whose: str, given: Any) -> Variables:
    """The variables of a network, from any form that has one meaning.

    Args:
        caller: name of the function that the user called.
        whose: the network in the message, such as "the student's".
        given: `Variables`; a pair `(params, state)`; or a Flax dict with the collection
            "params", which is split.

    Returns:
        The variables, of the same arrays.

    Raises:
        WrongType: if it is anything else, such as the parameters alone or a
            `TrainState`.
    """
    if isinstance(given, Variables):
        return given
    if isinstance(given, Mapping) and "params" in given:
        return split(given)
    if type(given) in (tuple, list) and len(given) == 2:
        return Variables(*given)
    do = "Pass the result of the network's init, or hintjax.split(flax_variables)."
    if isinstance(given, Mapping):
        do = (
            "Parameters alone are hintjax.Variables(params, {}); with other "
            "collections, hintjax.split({'params': params, 'batch_stats': ...})."
        )
    elif hasattr(given, "params"):
        do = (
            "Pass hintjax.Variables(state.params, {}), or with other collections "
            "hintjax.split({'params': state.params, 'batch_stats': ...})."
        )
    wanted = f"{whose} variables, hintjax.Variables(params, state)"
    raise WrongType(message(caller, wanted, form(given), do))


def join(variables: Variables) -> dict[str, PyTree]:
    """The argument of `module.apply`, from `Variables`; the inverse of `split`."""
    return {"params": variables.params, **variables.state}


def _sown(tree: PyTree) -> bool:
    """Whether a collection holds sown values: tuples with one entry per call."""
    if isinstance(tree, Mapping):
        return any(map(_sown, tree.values()))
    return isinstance(tree, tuple)
