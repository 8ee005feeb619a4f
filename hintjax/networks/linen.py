"""A Flax Linen module as a `Network`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Key, PyTree

from hintjax.networks.capture import default_call, watched
from hintjax.networks.network import Network, Variables, split

_COLLECTION = "intermediates"


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
            that takes nothing else.

    Returns:
        The network.

    Raises:
        TypeError: if the module takes other arguments and there is no `call`.

    >>> import jax
    >>> from hintjax.networks import Wants
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
    # initialization of a deep network at once takes five times as long.
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
                # The filter opens the collection, also if only sown values are
                # wanted.
                capture_intermediates=watch and (lambda m, name: watch(m.path, name)),
            )
        changed = dict(changed)
        captured = changed.pop(_COLLECTION, {})
        return output, captured, {**state, **changed}

    do = "Give nn.scan or nn.vmap variable_axes={'intermediates': 0}."
    return watched(type(module).__name__, init, run, hidden=do)


def _sowing(wanted: set[tuple[tuple[str, ...], str]]) -> Callable[..., Any]:
    """An interceptor that sows the inputs of the wanted submodules."""

    def sow(call_next, args, kwargs, context):
        if (context.module.path, context.method_name) in wanted:
            given = (*args, *kwargs.values())
            value = given[0] if len(given) == 1 else given
            context.module.sow(_COLLECTION, context.method_name + ":in", value)
        return call_next(*args, **kwargs)

    return sow
