"""Precision of a network's computations; parameters and losses stay as they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, PyTree

from hintjax._checks import Refusal, WrongType, described, instance, message
from hintjax.networks.network import Network


def computed_in(network: Network, dtype: DTypeLike) -> Network:
    """The network, computing in another precision: on TPU, bfloat16.

    Parameters are kept and updated in their own precision, and cast on their way into
    every pass; floating inputs are cast, too. On a mesh, XLA may sum gradients over
    devices in the lower precision, before it casts them back (on TPU it does).
    Statistics of BatchNorm stay as they are, and Flax sums them in float32. Losses
    convert their arguments to float32. Teacher and student have separate precisions:
    `hint_stage(student, computed_in(teacher, jnp.bfloat16), ...)`.

    Args:
        network: the network.
        dtype: a floating dtype.

    Returns:
        The network, with the same parameters and state.

    Raises:
        ValueError: if the dtype is not a floating one.
    """
    instance("computed_in", Network, network=network)
    wanted = "a floating dtype"
    try:
        # NumPy would read an array or a list as a record; it is no dtype.
        instance("computed_in", (str, type, np.dtype), dtype=dtype)
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise WrongType(message("computed_in", wanted, described(dtype))) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Refusal(message("computed_in", wanted, f"{jnp.dtype(dtype)}"))

    def apply(params, state, inputs, *, wants, train, key=None):
        shown, after = network.apply(
            _cast(params, dtype),
            state,
            _cast(inputs, dtype),
            wants=wants,
            train=train,
            key=key,
        )
        return shown, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    return network._replace(apply=apply)


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The tree, with its floating arrays in another dtype."""

    def cast(leaf: Any) -> Array | np.ndarray:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(cast, tree)
