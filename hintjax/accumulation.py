"""Gradient accumulation: one update from several micro-batches, each in its turn.

Micro-batch i of k has the examples i, i + k, i + 2k, ... On a mesh, where each device
has a block of neighbouring examples, each then keeps its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from hintjax.sharding import Layout


def micro_batches(batch: PyTree, count: int) -> PyTree:
    """The examples of a batch, which `count` divides, in micro-batches.

    >>> micro_batches(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """

    def cut(leaf):
        size = leaf.shape[0] // count
        return leaf.reshape(size, count, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def valid(batch: PyTree, count: int) -> Int[Array, " count"]:
    """How many examples count in each micro-batch."""
    where = batch.get("where")
    if where is not None:
        return jnp.sum(micro_batches(where, count), 1)
    size = jax.tree.leaves(batch)[0].shape[0]
    return jnp.full(count, size // count)


def weighed(
    mean: Float[Array, "..."], valid: Int[Array, ""], total: Int[Array, ""]
) -> Float[Array, "..."]:
    """What the mean over a micro-batch adds to that over the whole batch."""
    mean = jnp.asarray(mean, jnp.promote_types(mean.dtype, jnp.float32))
    return mean * (valid.astype(mean.dtype) / jnp.maximum(total, 1).astype(mean.dtype))


def summed(
    learn: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    parts: PyTree,
    layout: Layout | None,
) -> tuple[PyTree, PyTree]:
    """The sum of what each micro-batch gives.

    Args:
        learn: `(carry, part) -> (carry, what is summed)`.
        carry: what goes from each micro-batch to the next.
        parts: arrays whose first axis is that of the micro-batches.
        layout: of the stage.

    Returns:
        The last carry, and the sum.
    """
    if unrolled(layout):
        total = None
        for i in range(_count(parts)):
            carry, found = learn(carry, _part(parts, i + _nothing(total)))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return carry, total

    def one(before, part):
        carry, total = before
        carry, found = learn(carry, part)
        return (carry, jax.tree.map(jnp.add, total, found)), None

    _, shapes = jax.eval_shape(learn, carry, _part(parts, 0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (carry, total), _ = jax.lax.scan(one, (carry, zeros), parts)
    return carry, total


def stacked(
    function: Callable[[PyTree], PyTree], parts: PyTree, layout: Layout | None
) -> PyTree:
    """What a function makes of each micro-batch, along a new first axis."""
    if unrolled(layout):
        found = [function(_part(parts, i)) for i in range(_count(parts))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return jax.lax.map(function, parts)


def unrolled(layout: Layout | None) -> bool:
    """Whether each micro-batch is in the program for itself, and not one in a scan.

    On a CPU, where convolutions inside a scan are many times slower. Of programs that
    are compiled for other devices than are here, only a mesh knows.
    """
    if layout is None:
        return jax.default_backend() == "cpu"
    return layout.mesh.devices.flat[0].platform == "cpu"


def _count(parts):
    return jax.tree.leaves(parts)[0].shape[0]


def _part(parts, i):
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), parts
    )


def _nothing(total):
    """0, but only once the total is known.

    Else XLA may order all forward passes before the first backward pass, and keep what
    they computed: on a CPU it heeds no `optimization_barrier`.
    """
    beyond = [jnp.any(leaf > jnp.inf) for leaf in jax.tree.leaves(total)]
    return sum(one.astype(jnp.int32) for one in beyond)
