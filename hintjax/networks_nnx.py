"""A Flax NNX model as a `Network`; the only file that imports `flax.nnx`.

Parameters and state are plain nested dicts by scope, with list indices as text:
`params["blocks"]["0"]["kernel"]`. Every call builds a model of its own from them, so
that the model that was given is never touched.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax._checks import message
from hintjax.networks import Network, Variables, default_call, watched

_HIDDEN = (
    "It is not called, or in a transform of jax that its activations cannot leave: "
    "use nnx.scan, nnx.remat or nnx.jit."
)


def nnx(
    model: flax.nnx.Module | Callable[..., flax.nnx.Module],
    *,
    call: Callable[[flax.nnx.Module, PyTree, bool], PyTree] | None = None,
) -> Network:
    """A Flax NNX model as a `Network`.

    Hints are exposed by NNX's own `nnx.capture`, of the outputs that are wanted. Each
    application starts from `model.train()` or `model.eval()`. Keys of NNX's random
    streams are no state: all streams are folded from the key of the call, so that
    equal keys give equal dropout; in evaluation without a key, from key 0.

    Args:
        model: a factory `(rngs=) -> model`, such as the class itself, with which
            `init` draws parameters from its key; or a model, with which `init` gives
            that model's own variables (a pretrained teacher), whatever the key.
        call: `(model, inputs, train) -> output`, for a model that is called in its
            own way. By default `model(inputs, train=train)`, or `model(inputs)` for a
            model that takes nothing else.

    Returns:
        The network. Its state is all that is neither `nnx.Param` nor a random stream.

    Raises:
        TypeError: if the model takes other arguments and there is no `call`.

    >>> from flax import nnx as flax_nnx
    >>> class Student(flax_nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.hidden = flax_nnx.Linear(3, 4, rngs=rngs)
    ...         self.head = flax_nnx.Linear(4, 2, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.head(self.hidden(x))
    >>> net = nnx(Student)
    >>> x = jnp.ones((1, 3))
    >>> params, state = net.init(jax.random.key(0), x)
    >>> {path: layer.shape for path, layer in net.layers(params, state, x).items()}
    {'hidden': (1, 4), 'head': (1, 2)}
    """
    if isinstance(model, flax.nnx.Module):
        graph, *parts = _split(model)
        templates = jax.eval_shape(lambda: parts)
    else:
        # The graph is the same for every key, and this draws nothing.
        graph, *templates = _split(
            flax.nnx.eval_shape(lambda: model(rngs=flax.nnx.Rngs(0)))
        )
    streams, params_like, state_like = templates
    blank = flax.nnx.merge(graph, *templates)
    name = type(blank).__name__
    call = call or default_call("nnx", blank)

    def init(key, inputs):
        made = model
        if not isinstance(model, flax.nnx.Module):
            made = model(rngs=flax.nnx.Rngs(key))
        _, _, params, state = _split(made)
        return Variables(_plain(params), _plain(state))

    def run(params, state, inputs, train, key, watch, given):
        if train and key is None and jax.tree.leaves(streams):
            do = "The model has random streams."
            raise ValueError(message(name, "a key in training", "None", do))
        # New variables in every call: those of an outer trace cannot be changed.
        made = flax.nnx.merge(
            graph,
            _streams(streams, jax.random.key(0) if key is None else key),
            _filled("params", params_like, params),
            _filled("state", state_like, state),
        )
        if train:
            made.train()
        else:
            made.eval()
        if watch:
            for path, module in list(flax.nnx.iter_modules(made)):
                _watch(module, tuple(map(str, path)), watch, given)
        output, captured = flax.nnx.capture(call, flax.nnx.Intermediate)(
            made, inputs, train
        )
        return output, _plain(captured), _plain(_split(made)[-1])

    return watched(name, init, run, _HIDDEN)


def nnx_update(model: flax.nnx.Module, variables: Variables) -> None:
    """Writes variables into an NNX model, such as those of a trained student.

    Args:
        model: with the structure of the network that the variables are of.
        variables: its parameters and state.

    Raises:
        ValueError: if they are not those of such a model.
    """
    _, _, params, state = _split(model)
    flax.nnx.update(
        model,
        _filled("params", params, variables.params),
        _filled("state", state, variables.state),
    )


def _split(model):
    """The graph, and the states of random streams, parameters and all else."""
    return flax.nnx.split(model, flax.nnx.RngState, flax.nnx.Param, ...)


def _plain(state):
    """A state as nested dicts by text, of values."""
    tree: dict[str, Any] = {}
    for path, leaf in flax.nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        variable = isinstance(leaf, flax.nnx.Variable)
        node[str(path[-1])] = leaf.get_value() if variable else leaf
    return tree


def _filled(where, like, tree):
    """The inverse of `_plain`: a state of new variables."""

    def value(path):
        try:
            return functools.reduce(lambda node, part: node[str(part)], path, tree)
        except (KeyError, TypeError) as error:
            got = f"none at {'/'.join(map(str, path))!r}"
            do = "Pass what the network's init gave."
            raise ValueError(message(where, "this model's", got, do)) from error

    return _new(like, value)


def _new(like, value):
    """A state of new variables, with values by path."""
    return flax.nnx.from_flat_state(
        (path, leaf.replace(value(path)))
        if isinstance(leaf, flax.nnx.Variable)
        else (path, value(path))
        for path, leaf in flax.nnx.to_flat_state(like)
    )


def _streams(like, key):
    """Random streams at their start, each with its own key."""
    values = {}
    for number, (path, leaf) in enumerate(flax.nnx.to_flat_state(like)):
        if isinstance(leaf, flax.nnx.RngKey):
            one = jax.random.fold_in(key, number)
            values[path] = jax.random.split(one, leaf.shape) if leaf.shape else one
        else:
            values[path] = jnp.zeros(leaf.shape, leaf.dtype)
    return _new(like, values.__getitem__)


def _watch(module, scope, watch, given):
    """Makes a module sow what is wanted of it, by giving it a subclass of its own.

    `nnx.capture(method_outputs=...)` changes the class for all its instances, those of
    other networks included, and passes over inherited methods.
    """
    ours = set(flax.nnx.Module.__mro__)
    methods = {
        name
        for base in type(module).__mro__
        if base not in ours
        for name, value in vars(base).items()
        if callable(value) and not isinstance(value, (type, staticmethod, classmethod))
    }
    outputs = frozenset(name for name in methods if watch(scope, name))
    inputs = frozenset(name for name in methods if (scope, name) in given)
    if outputs or inputs:
        # Not through the module's own __setattr__, which would keep it as a field.
        watching = _watching(type(module), outputs, inputs)
        object.__setattr__(module, "__class__", watching)


@functools.cache
def _watching(cls, outputs, inputs):
    """A subclass, made once, that sows what some methods are given and return."""

    def sowing(name):
        @functools.wraps(getattr(cls, name))
        def method(self, *args, **kwargs):
            if name in inputs:
                given = (*args, *kwargs.values())
                given = given[0] if len(given) == 1 else given
                self.sow(flax.nnx.Intermediate, f"{name}:in", given)
            result = getattr(super(watching, self), name)(*args, **kwargs)
            if name in outputs:
                self.sow(flax.nnx.Intermediate, name, result)
            return result

        return method

    methods = {name: sowing(name) for name in outputs | inputs}
    # A name for `super` above: the class is made once its methods are.
    watching = type(cls)(cls.__name__, (cls,), methods)
    return watching


__all__ = ["nnx", "nnx_update"]
