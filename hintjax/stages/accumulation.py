"""Gradient accumulation: one update from several micro-batches, one after another.

Micro-batch i of k has the examples i, i + k, i + 2k, ... of the batch. On a mesh, where
each device has a block of neighboring examples, every example then stays on its device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from hintjax.sharding import Layout, check_even
from hintjax.stages.placement import Placement
from hintjax.stages.stage import Batch, Carry, Parts


def divided(batch: Batch, count: int, place: Placement) -> Batch:
    """Returns a batch that can be cut into micro-batches, shared out over the devices.

    Args:
        batch: the batch.
        count: number of micro-batches.
        place: where the stage's arrays live.

    Raises:
        ValueError: if the micro-batches, or the devices' parts, have unequal sizes.
    """
    devices = f" on {place.parts} devices" if place.parts > 1 else ""
    check_even(batch, count * place.parts, f"{count} micro-batches{devices}")
    return place.batch(batch)


def in_micro_batches(
    function: Callable[..., tuple[PyTree, Carry]],
    parts: Parts,
    count: int,
    place: Placement,
) -> tuple[PyTree, Carry, Parts]:
    """Returns the sum of the results of a function over the micro-batches of a batch.

    Args:
        function: `(parts, weigh, number) -> (result, carry)`. `weigh` turns a mean over
            the micro-batch into its summand of the mean over the batch; `number` turns
            the position of an example in its micro-batch into that in the batch.
        parts: the arguments of the loss of the whole batch; `taught` is stacked by
            micro-batch.
        count: number of micro-batches.
        place: where the stage's arrays live.

    Returns:
        The sum, the carry after the last micro-batch, and the arguments of the loss of
        the first.
    """
    counts = valid(parts.batch, count)
    parts = parts._replace(params=place.params(parts.params))

    def micro(carry: Carry, i: Int[Array, ""] | int) -> Parts:
        return parts._replace(
            state=carry.state,
            memory=carry.memory,
            taught=entry(parts.taught, i),
            batch=place.batch(micro_batch(parts.batch, i, count)),
            key=jax.random.fold_in(parts.key, i),
        )

    def one(carry: Carry, i: Int[Array, ""] | int) -> tuple[Carry, PyTree]:
        weigh = partial(weighed, valid=counts[i], total=jnp.sum(counts))

        def number(position: Int[Array, ""]) -> Int[Array, ""]:
            return position * count + i

        result, after = function(micro(carry, i), weigh, number)
        return after, result

    carry = Carry(parts.state, parts.memory)
    after, total = summed(one, carry, count, place.layout)
    return total, after, micro(carry, 0)


def itself(x: Array) -> Array:
    """Returns its argument: `weigh` and `number` of a batch that is not divided."""
    return x


def micro_batch(batch: PyTree, i: Int[Array, ""] | int, count: int) -> PyTree:
    """Returns the i-th of `count` micro-batches; only these examples are copied.

    >>> micro_batch(jnp.arange(6), 1, 2).tolist()
    [1, 3, 5]
    """
    return jax.tree.map(lambda leaf: entry(_cut(leaf, count), i, 1), batch)


def entry(tree: PyTree, i: Int[Array, ""] | int, axis: int = 0) -> PyTree:
    """Returns the i-th entry of every array along an axis."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, axis, keepdims=False), tree
    )


def valid(batch: PyTree, count: int) -> Int[Array, " count"]:
    """Returns how many examples of each micro-batch count."""
    where = batch.get("where")
    if where is not None:
        return jnp.sum(_cut(where, count), 0)
    return jnp.full(count, jax.tree.leaves(batch)[0].shape[0] // count)


def weighed(
    mean: Float[Array, "..."], valid: Int[Array, ""], total: Int[Array, ""]
) -> Float[Array, "..."]:
    """Returns the summand of a micro-batch in the mean over the whole batch.

    Args:
        mean: mean over the valid examples of the micro-batch.
        valid: number of these examples.
        total: number of valid examples in the batch.
    """
    mean = jnp.asarray(mean, jnp.promote_types(mean.dtype, jnp.float32))
    return mean * (valid.astype(mean.dtype) / jnp.maximum(total, 1).astype(mean.dtype))


def summed(
    function: Callable[[PyTree, Int[Array, ""] | int], tuple[PyTree, PyTree]],
    carry: PyTree,
    count: int,
    layout: Layout | None,
) -> tuple[PyTree, PyTree]:
    """Returns the last carry, and the sum of the results of all micro-batches.

    Args:
        function: `(carry, i) -> (carry, result)` for the i-th micro-batch.
        carry: the first carry.
        count: number of micro-batches.
        layout: the stage's; None for one device.
    """
    if unrolled(layout):
        total = None
        for i in range(count):
            carry, found = function(carry, i + _zero_after(total))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return carry, total

    def one(before: tuple[PyTree, PyTree], i: Array) -> tuple[PyTree, None]:
        carry, total = before
        carry, found = function(carry, i)
        return (carry, jax.tree.map(jnp.add, total, found)), None

    _, shapes = jax.eval_shape(function, carry, 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (carry, total), _ = jax.lax.scan(one, (carry, zeros), jnp.arange(count))
    return carry, total


def stacked(
    function: Callable[[Int[Array, ""] | int], PyTree],
    count: int,
    layout: Layout | None,
) -> PyTree:
    """Returns the results of a function for all micro-batches, along a new first axis.

    Args:
        function: of the number of a micro-batch.
        count: number of micro-batches.
        layout: the stage's; None for one device.
    """
    if unrolled(layout):
        found = map(function, range(count))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return jax.lax.map(function, jnp.arange(count))


def unrolled(layout: Layout | None) -> bool:
    """Whether the program repeats itself for each micro-batch instead of scanning.

    It does on a CPU, where convolutions inside a scan are many times slower. A program
    may be compiled for devices that this machine does not have: then the mesh knows
    their platform.
    """
    if layout is None:
        return jax.default_backend() == "cpu"
    return layout.mesh.devices.flat[0].platform == "cpu"


def _cut(leaf: Array, count: int) -> Array:
    return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])


def _zero_after(total: PyTree) -> Int[Array, ""] | int:
    """Returns 0, which depends on the total so far.

    Without the dependency XLA may order all forward passes before the first backward
    pass, and keep all activations: on a CPU it ignores `optimization_barrier`.
    """
    beyond = [jnp.any(leaf > jnp.inf) for leaf in jax.tree.leaves(total)]
    return sum(one.astype(jnp.int32) for one in beyond)
