"""A Flax Linen module as a `Network`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
from jaxtyping import Array, Key, PyTree

from hintjax._checks import Refusal, accepts, instance, message
from hintjax.networks.capture import default_call, watched
from hintjax.networks.network import Network, Variables, split

_COLLECTION = "intermediates"
# Flax's errors about variables that belong to another module.
_OTHERS = (
    flax.errors.ApplyScopeInvalidVariablesStructureError,
    flax.errors.ApplyScopeInvalidVariablesTypeError,
    flax.errors.ScopeCollectionNotFound,
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeParamShapeError,
)


def linen(
    module: nn.Module,
    *,
    call: Callable[[nn.Module, PyTree, bool], PyTree] | None = None,
) -> Network:
    """A Flax Linen module as a `Network`.

    Linen's own `capture_intermediates` exposes the hints, with a filter for the paths
    that are wanted. Under jit, only the layers that feed the results are computed.

    Args:
        module: the module, unbound.
        call: `(module, inputs, train) -> output`, for a module with another call.
            By default `module(inputs, train=train)`, or `module(inputs)` for a module
            that takes nothing else. A module that has `train` as an attribute needs
            `lambda m, x, train: m.clone(parent=m.scope, train=train)(x)`.

    Returns:
        The network.

    Raises:
        TypeError: if it is no module, or the module takes other arguments and there is
            no `call`.

    >>> import jax
    >>> from hintjax.networks import Wants
    >>> net = linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
    >>> x = jax.numpy.ones((1, 3))
    >>> params, state = net.init(jax.random.key(0), x)
    >>> list(net.layers(params, state, x))
    ['layers_0', 'layers_2', ':out']
    >>> wants = Wants(output=True, hints=("layers_0",))
    >>> features, _ = net.apply(params, state, x, wants=wants, train=False)
    >>> features.output.shape, features.hints["layers_0"].shape
    ((1, 2), (1, 4))
    """
    do = "Pass the module itself, Net(), not its class; hintjax.nnx takes NNX models."
    instance("linen", nn.Module, do, module=module)
    name = type(module).__name__
    call = call or default_call("linen", module)
    accepts("linen", ("module", "inputs", "train"), call=call)

    # Not jitted: equal layers share their compiled operations, and compiling the
    # initialization of a deep network at once takes five times as long.
    def init(key: Key[Array, ""], inputs: PyTree) -> Variables:
        return split(module.init(key, inputs, False, method=call))

    def run(params, state, inputs, train, key, watch, given):
        do = "Pass hintjax.split(variables) of this module's own init."
        instance(name, Mapping, do, params=params, state=state)
        collections = [*(state if train else ()), *([_COLLECTION] if watch else ())]
        try:
            with nn.intercept_methods(_sowing(given)):
                output, changed = module.apply(
                    {"params": params, **state},
                    inputs,
                    train,
                    method=call,
                    rngs=key,
                    mutable=collections,
                    # The filter opens the collection, also if only sown values are
                    # wanted.
                    capture_intermediates=watch and (lambda m, of: watch(m.path, of)),
                )
        except _OTHERS as error:
            text = str(error).partition(" (https:")[0]
            wanted, got = "the variables of this module", f"others: {text}"
            raise Refusal(message(name, wanted, got, do)) from error
        changed = dict(changed)
        captured = changed.pop(_COLLECTION, {})
        return output, captured, {**state, **changed}

    hidden = "Give nn.scan or nn.vmap variable_axes={'intermediates': 0}."
    return watched(name, init, run, hidden)


def _sowing(wanted: set[tuple[tuple[str, ...], str]]) -> Callable[..., Any]:
    """An interceptor that sows the inputs of the wanted submodules."""

    def sow(call_next, args, kwargs, context):
        if (context.module.path, context.method_name) in wanted:
            given = (*args, *kwargs.values())
            value = given[0] if len(given) == 1 else given
            context.module.sow(_COLLECTION, context.method_name + ":in", value)
        return call_next(*args, **kwargs)

    return sow
