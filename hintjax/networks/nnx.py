"""A Flax NNX model as a `Network`; the only file that imports `flax.nnx`.

Parameters and state are plain nested dicts by scope, with list indices as text:
`params["blocks"]["0"]["kernel"]`. Only parameters whose axes have names
(`nnx.with_partitioning`) are in Linen's boxes, where `hintjax.sharding` finds the
names. Every call builds a new model from parameters and state, so the user's model
never changes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, accepts, instance, message
from hintjax.networks.capture import default_call, watched
from hintjax.networks.network import Network, Variables, read_variables


def nnx(
    model: flax.nnx.Module | Callable[..., flax.nnx.Module],
    *,
    call: Callable[[flax.nnx.Module, PyTree, bool], PyTree] | None = None,
) -> Network:
    """A Flax NNX model as a `Network`.

    NNX's own `nnx.capture` exposes the hints that are wanted. Each application starts
    from `model.train()` or `model.eval()`. Keys of NNX's random streams are not state:
    all streams are folded from the key of the call, so that equal keys give equal
    dropout. Evaluation without a key uses key 0.

    Args:
        model: a factory `(rngs=) -> model`, such as the class itself, with which
            `init` draws parameters from its key; or a model (a pretrained teacher),
            with which `init` gives the model's own variables for every key.
        call: `(model, inputs, train) -> output`, for a model with another call. By
            default `model(inputs, train=train)`, or `model(inputs)` for a model that
            takes nothing else.

    Returns:
        The network. Its state is every variable that is neither `nnx.Param` nor a
        random stream. (NNX makes a model whose axes have names only under
        `jax.set_mesh`, or without `nnx.use_eager_sharding`.)

    Raises:
        TypeError: if the model takes other arguments and there is no `call`.

    >>> def student(rngs):
    ...     layers = [flax.nnx.Linear(3, n, rngs=rngs) for n in (3, 2)]
    ...     return flax.nnx.Sequential(*layers)
    >>> net = nnx(student)
    >>> x = jnp.ones((1, 3))
    >>> params, state = net.init(jax.random.key(0), x)
    >>> {path: layer.shape for path, layer in net.layers(params, state, x).items()}
    {'layers/0': (1, 3), 'layers/1': (1, 2), ':out': (1, 2)}
    """
    if isinstance(model, nn.Module):
        do = "Pass it to hintjax.linen."
        raise WrongType(message("nnx", "an NNX model", "a Linen module", do))
    if not isinstance(model, flax.nnx.Module):
        do = "Pass a model, or a factory that takes rngs."
        accepts("nnx", (), ("rngs",), do, model=model)
    factory = (lambda rngs: model) if isinstance(model, flax.nnx.Module) else model
    # The graph is the same for every key, and this draws nothing.
    shape = flax.nnx.eval_shape(lambda: factory(rngs=flax.nnx.Rngs(0)))
    graph, streams, params_like, state_like = _split(shape)
    name = type(shape).__name__
    call = call or default_call("nnx", shape)
    accepts("nnx", ("model", "inputs", "train"), call=call)

    def init(key, inputs):
        _, _, params, state = _split(factory(rngs=flax.nnx.Rngs(key)))
        return Variables(_plain(params, _boxed), _plain(state))

    def run(params, state, inputs, train, key, watch, given):
        if train and key is None and jax.tree.leaves(streams):
            do = "The model has random streams."
            raise Refusal(message(name, "a key in training", "None", do))
        # New variables in every call: variables of an outer trace cannot be changed.
        made = flax.nnx.merge(
            graph,
            _streams(streams, jax.random.key(0) if key is None else key),
            _filled("params", params_like, params),
            _filled("state", state_like, state),
        )
        made.train() if train else made.eval()
        for path, module in list(flax.nnx.iter_modules(made)) if watch else ():
            _watch(module, tuple(map(str, path)), watch, given)

        def called(made):
            for _, module in list(flax.nnx.iter_modules(made)):
                # Some versions mark lists, too; no transform takes a marked list.
                if isinstance(module, flax.nnx.List):
                    vars(module).pop("__captures__", None)
            return call(made, inputs, train)

        output, captured = flax.nnx.capture(called, flax.nnx.Intermediate)(made)
        return output, _plain(captured), _plain(_split(made)[-1])

    do = "It is not called, or in a transform of jax: use nnx.scan, nnx.remat, nnx.jit."
    return watched(name, init, run, hidden=do)


def nnx_update(
    model: flax.nnx.Module, variables: Variables | Mapping[str, PyTree]
) -> None:
    """Writes variables into an NNX model, for instance of a trained student.

    Args:
        model: a model of the same structure as the network of the variables.
        variables: parameters and state of the network.

    Raises:
        ValueError: if the model has a variable that `variables` lack.
    """
    instance("nnx_update", flax.nnx.Module, model=model)
    variables = read_variables("nnx_update", "the model's", variables)
    _, _, params, state = _split(model)
    flax.nnx.update(
        model,
        _filled("params", params, variables.params),
        _filled("state", state, variables.state),
    )


def _split(model: flax.nnx.Module) -> tuple[Any, ...]:
    """The graph, and the states of random streams, parameters and all else."""
    return flax.nnx.split(model, flax.nnx.RngState, flax.nnx.Param, ...)


def _value(leaf: Any) -> Any:
    """The array of a variable."""
    return leaf.get_value() if isinstance(leaf, flax.nnx.Variable) else leaf


def _boxed(leaf: Any) -> Any:
    """The value, in a box with the names of its axes if they have names."""
    told = leaf.get_metadata()
    names = told.get("out_sharding")
    if not names:
        return _value(leaf)
    names = tuple(getattr(names, "spec", names))
    rules = told.get("sharding_rules")
    return nn.LogicallyPartitioned(_value(leaf), names, rules=rules)


def _plain(state: Any, read: Callable[[Any], Any] = _value) -> dict[str, Any]:
    """A state as nested dicts with keys of text; `read` is applied to the leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in flax.nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = read(leaf)
    return tree


def _filled(where: str, like: Any, tree: PyTree) -> Any:
    """The inverse of `_plain`: a state of new variables."""

    def filled(path, leaf):
        try:
            value = functools.reduce(lambda node, part: node[str(part)], path, tree)
        except (KeyError, TypeError) as error:
            got, do = f"none at {path}", "Pass the result of the network's init."
            wanted = "the variables of this model"
            raise Refusal(message(where, wanted, got, do)) from error
        value = value.value if isinstance(value, nn.Partitioned) else value
        return leaf.replace(value) if isinstance(leaf, flax.nnx.Variable) else value

    flat = flax.nnx.to_flat_state(like)
    return flax.nnx.from_flat_state((path, filled(path, leaf)) for path, leaf in flat)


def _streams(like: Any, key: jax.Array) -> Any:
    """Random streams at their start, each with its own key."""

    def start(number, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.fold_in(key, number), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten(like)
    return jax.tree.unflatten(tree, [start(*leaf) for leaf in enumerate(leaves)])


def _watch(
    module: Any,
    scope: tuple[str, ...],
    watch: Callable[[tuple[str, ...], str], bool],
    given: set[tuple[tuple[str, ...], str]],
) -> None:
    """Makes a module sow its wanted inputs and outputs: it gets its own subclass.

    `nnx.capture(method_outputs=...)` is not used: it changes the class for all its
    instances, also in other networks, and it ignores inherited methods.
    """
    methods = {
        name
        for base in set(type(module).__mro__) - set(flax.nnx.Module.__mro__)
        for name, value in vars(base).items()
        if callable(value) and not isinstance(value, (type, staticmethod, classmethod))
    }
    outputs = frozenset(name for name in methods if watch(scope, name))
    inputs = frozenset(name for name in methods if (scope, name) in given)
    if outputs or inputs:
        module._hintjax = True
        # Not through the module's own __setattr__, which would keep it as a field.
        watching = _watching(type(module), outputs, inputs)
        object.__setattr__(module, "__class__", watching)


@functools.cache
def _watching(cls: type, outputs: frozenset[str], inputs: frozenset[str]) -> type:
    """A subclass, made once, that sows inputs and outputs of some methods."""

    def sow(module: Any, name: str, value: Any) -> None:
        try:
            module._hintjax = True  # refused inside a transform of jax
        except flax.errors.TraceContextError:
            return  # the value could not leave the transform
        module.sow(flax.nnx.Intermediate, name, value)

    def sowing(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if name in inputs:
                given = (*args, *kwargs.values())
                sow(self, f"{name}:in", given[0] if len(given) == 1 else given)
            result = getattr(super(watching, self), name)(*args, **kwargs)
            if name in outputs:
                sow(self, name, result)
            return result

        return method

    methods = {name: sowing(name) for name in outputs | inputs}
    watching: type = type(cls)(cls.__name__, (cls,), methods)
    return watching


__all__ = ["nnx", "nnx_update"]
