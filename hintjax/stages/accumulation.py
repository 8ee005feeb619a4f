"""Gradient accumulation: one update from several micro-batches, each in its turn.

Micro-batch i of k has the examples i, i + k, i + 2k, ... On a mesh, where each device
has a block of neighbouring examples, each then keeps its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from hintjax.sharding import Layout


def micro_batch(batch: PyTree, i: Int[Array, ""] | int, count: int) -> PyTree:
    """The i-th of `count` micro-batches, which divide the batch; it alone is copied.

    >>> micro_batch(jnp.arange(6), 1, 2).tolist()
    [1, 3, 5]
    """
    return jax.tree.map(lambda leaf: entry(_cut(leaf, count), i, 1), batch)


def entry(tree: PyTree, i: Int[Array, ""] | int, axis: int = 0) -> PyTree:
    """The i-th entry of every array, along an axis."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, axis, keepdims=False), tree
    )


def valid(batch: PyTree, count: int) -> Int[Array, " count"]:
    """How many examples count in each micro-batch."""
    where = batch.get("where")
    if where is not None:
        return jnp.sum(_cut(where, count), 0)
    return jnp.full(count, jax.tree.leaves(batch)[0].shape[0] // count)


def weighed(
    mean: Float[Array, "..."], valid: Int[Array, ""], total: Int[Array, ""]
) -> Float[Array, "..."]:
    """What the mean over a micro-batch adds to that over the whole batch."""
    mean = jnp.asarray(mean, jnp.promote_types(mean.dtype, jnp.float32))
    return mean * (valid.astype(mean.dtype) / jnp.maximum(total, 1).astype(mean.dtype))


def summed(
    learn: Callable[[PyTree, Int[Array, ""] | int], tuple[PyTree, PyTree]],
    carry: PyTree,
    count: int,
    layout: Layout | None,
) -> tuple[PyTree, PyTree]:
    """The sum of what each micro-batch gives.

    Args:
        learn: `(carry, i) -> (carry, what is summed)`, for the i-th micro-batch.
        carry: what goes from each micro-batch to the next.
        count: how many there are.
        layout: of the stage.

    Returns:
        The last carry, and the sum.
    """
    if unrolled(layout):
        total = None
        for i in range(count):
            carry, found = learn(carry, i + _nothing(total))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return carry, total

    def one(before, i):
        carry, total = before
        carry, found = learn(carry, i)
        return (carry, jax.tree.map(jnp.add, total, found)), None

    _, shapes = jax.eval_shape(learn, carry, 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (carry, total), _ = jax.lax.scan(one, (carry, zeros), jnp.arange(count))
    return carry, total


def stacked(
    function: Callable[[Int[Array, ""] | int], PyTree],
    count: int,
    layout: Layout | None,
) -> PyTree:
    """What a function makes of each micro-batch, along a new first axis."""
    if unrolled(layout):
        found = map(function, range(count))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return jax.lax.map(function, jnp.arange(count))


def unrolled(layout: Layout | None) -> bool:
    """Whether each micro-batch is in the program for itself, and not one in a scan.

    On a CPU, where convolutions inside a scan are many times slower. Of programs that
    are compiled for other devices than are here, only a mesh knows.
    """
    if layout is None:
        return jax.default_backend() == "cpu"
    return layout.mesh.devices.flat[0].platform == "cpu"


def _cut(leaf, count):
    return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])


def _nothing(total):
    """0, but only once the total is known.

    Else XLA may order all forward passes before the first backward pass, and keep what
    they computed: on a CPU it heeds no `optimization_barrier`.
    """
    beyond = [jnp.any(leaf > jnp.inf) for leaf in jax.tree.leaves(total)]
    return sum(one.astype(jnp.int32) for one in beyond)
