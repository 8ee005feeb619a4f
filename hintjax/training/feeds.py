"""Feeds: the batches of training, from the device or from Grain.

Both give the same batches. The device crops, flips and standardizes images that it
holds, or that the host has read ahead.
"""

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Int32, Key, PyTree, UInt8

from hintjax._checks import Refusal, WrongType, message
from hintjax.data import (
    Augment,
    Dataset,
    Placed,
    Split,
    View,
    order,
    place,
    steps_per_epoch,
    view_of,
)
from hintjax.data.batches import shown
from hintjax.data.stream import read_ahead
from hintjax.method import Data
from hintjax.sharding import from_process, over_batch, replicated, spread
from hintjax.stages import Stage, State

Batch = Mapping[str, Array]
Metrics = Mapping[str, Array]


class Program(NamedTuple):
    """A stage compiled together with the making of its batches.

    Share one program between runs: seeds and initial values are arguments.

    Attributes:
        stage: the stage.
        one: `(state, teacher, read, standardize, crops, at) -> (state, metrics)`: makes
            one batch and one step.
        many: makes `count` steps in one dispatch, from a split on the device.
        batch: `(read, standardize, crops, at) -> batch`: makes one batch alone.
    """

    stage: Stage
    one: Callable[..., tuple[State, Metrics]]
    many: Callable[..., tuple[State, Metrics]]
    batch: Callable[..., Batch]


class Drawn(NamedTuple):
    """The examples of a step in a split that is on the device.

    Attributes:
        split: the split.
        order: the order of its examples in this epoch.
        step: the number of the step in this epoch.
    """

    split: Placed
    order: Int32[Array, " n"]
    step: ArrayLike

    def read(self, batch_size: int) -> Mapping[str, Any]:
        """The examples, with uint8 images."""
        start = (self.step * batch_size,)
        index = jax.lax.dynamic_slice(self.order, start, (batch_size,))
        image, label = self.split.read(index)
        return {"image": image, "label": label, "index": index}


class Feed(NamedTuple):
    """Trains on batches from one source. The number of a step alone tells its batch.

    Attributes:
        advance: `(program, state, teacher, at, count) -> (state, metrics)`: makes the
            steps `at` to `at + count` of the run.
        example: one batch, for its shapes.
        data: size and labels of the training set.
        per_epoch: steps in an epoch.
        lower: `(program, state, teacher) -> jax.stages.Lowered`: the program of one
            step, which `compile` makes before the first step. The state and the teacher
            may be shapes. On one device, training does not compile it again.
        waited: seconds in which steps waited for a batch, since the last call.
        upcoming: `(program, at) -> batch`: the batch that step `at` will train on.
    """

    advance: Callable[..., tuple[State, Metrics]]
    example: Batch
    data: Data
    per_epoch: int
    lower: Callable[..., jax.stages.Lowered]
    upcoming: Callable[[Program, int], Batch]
    waited: Callable[[], float] = lambda: 0.0


def program(
    stage: Stage,
    batch_size: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles a stage together with the crops and flips of its batches.

    Args:
        stage: the stage.
        batch_size: examples in a step.
        augment: crops and flips.
        mesh: the stage's mesh, if it has one.

    Returns:
        The program; nothing is compiled before its first call. It reads a batch from
        the device (`Drawn`), or takes one that the host has read.
    """
    augment = augment or Augment()

    def batch_of(read, standardize, crops, at):
        batch = read.read(batch_size) if isinstance(read, Drawn) else read
        key = view = None
        if isinstance(crops, View):
            view = crops
        else:
            key = jax.random.fold_in(crops, at)
        batch = shown(batch, standardize, key=key, augment=augment, view=view)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, over_batch(mesh))
        return batch

    def body(state, teacher, read, standardize, crops, at):
        batch = batch_of(read, standardize, crops, at)
        return stage.step(state, stage.teach(state, teacher, batch), batch)

    def many(state, teacher, drawn, standardize, crops, at, count):
        def one(state, i):
            read = drawn._replace(step=drawn.step + i)
            return body(state, teacher, read, standardize, crops, at + i)

        state, metrics = jax.lax.scan(one, state, jnp.arange(count))
        return state, jax.tree.map(lambda leaf: leaf[-1], metrics)

    return Program(
        stage,
        jax.jit(body, donate_argnums=0),
        jax.jit(many, donate_argnums=0, static_argnames="count"),
        jax.jit(batch_of),
    )


def on_device(
    dataset: Dataset,
    batch_size: int,
    key: Key[Array, ""],
    mesh: Mesh | None = None,
    views: UInt8[np.ndarray, "views n 3"] | None = None,
) -> Feed:
    """Batches of a training split that is kept on the device as uint8.

    The order changes with every epoch.

    Args:
        dataset: a dataset in memory, decoded.
        batch_size: examples in a step.
        key: the key of the order, the crops and the flips.
        mesh: the mesh over which the split is replicated.
        views: fixed crops and flips, one view per epoch in turn; see
            `hintjax.data.fixed_views`. By default crops and flips are random.

    Returns:
        The feed.
    """
    if not isinstance(dataset.train, Split):
        got = type(dataset.train).__name__
        do = "Read it with hintjax.training.streamed."
        raise WrongType(message("on_device", "a decoded training split", got, do))
    train = place(dataset.train, None if mesh is None else replicated(mesh))
    epochs = _Epochs.of(dataset, batch_size, key, mesh, views)

    @lru_cache(maxsize=1)
    def ordered(epoch: int) -> Array:
        return _on(mesh, replicated, epochs.order(epoch))

    def place_of(at: int) -> tuple[Any, ...]:
        epoch, step = divmod(at, epochs.steps)
        return Drawn(train, ordered(epoch), step), *epochs.seen(at), at

    def advance(program, state, teacher, at, count):
        where = place_of(at)
        if count == 1:
            return program.one(state, teacher, *where)
        return program.many(state, teacher, *where, count=count)

    return Feed(
        advance=advance,
        example=epochs.example(Drawn(train, jnp.arange(train.n), 0).read(batch_size)),
        data=Data(train.label),
        per_epoch=epochs.steps,
        lower=lambda program, *state: program.one.lower(*state, *place_of(0)),
        upcoming=lambda program, at: program.batch(*place_of(at)),
    )


def streamed(
    dataset: Dataset,
    batch_size: int,
    key: Key[Array, ""],
    mesh: Mesh | None = None,
    views: UInt8[np.ndarray, "views n 3"] | None = None,
    also: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Feed:
    """Batches of a training split that does not fit on the device, read by Grain.

    They are the batches of `on_device` with the same key.

    Args:
        dataset: its training split is read from the host's memory or from disk.
        batch_size: examples in a step, over all processes together.
        key: the key of the order, the crops and the flips.
        mesh: the mesh over which a batch is split. Each process reads its own part of
            the batch.
        views: fixed crops and flips; see `on_device`.
        also: `(batch) -> batch` on the host, which may add entries to a batch, such as
            the features of a cached teacher.

    Returns:
        The feed.
    """
    train, processes = dataset.train, jax.process_count()
    if batch_size % processes:
        do = f"Use a multiple of {processes}."
        wanted = f"a batch size that {processes} processes can share"
        raise Refusal(message("streamed", wanted, f"{batch_size}", do))
    size = batch_size // processes
    epochs = _Epochs.of(dataset, batch_size, key, mesh, views)

    @lru_cache(maxsize=1)
    def ordered(epoch: int) -> np.ndarray:
        return np.asarray(epochs.order(epoch))

    def read(index: np.ndarray, epoch: int) -> Mapping[str, Any]:
        image, label = train.read(index)
        batch = {"image": image, "label": label, "index": index}
        if views is not None:
            batch["view"] = np.full(len(index), epoch % len(views), np.int32)
        return also(batch)

    def read_step(at: int) -> Mapping[str, Any]:
        epoch, step = divmod(at, epochs.steps)
        start = step * batch_size + jax.process_index() * size
        return read(ordered(epoch)[start : start + size], epoch)

    dispatched, seconds = [], 0.0  # arrays of the last step; waited since last asked
    reading, due = None, None  # Grain's iterator, and the step that it gives next
    looked_at: dict[int, Mapping[str, Any]] = {}  # the batch of a step to come

    def batch_at(at: int) -> Mapping[str, Any]:
        nonlocal seconds, reading, due
        if at in looked_at:
            return looked_at.pop(at)
        start = time.perf_counter()
        if reading is None or at != due:
            if reading is not None:
                reading.close()
            reading = read_ahead(read_step, at)
        batch, due = next(reading), at + 1
        # While an earlier step still runs, a late batch delays nothing. If that step
        # has ended by now, the whole wait counts.
        if all(array.is_ready() for array in dispatched):
            seconds += time.perf_counter() - start
        return batch if mesh is None else from_process(batch, mesh)

    def advance(program, state, teacher, at, count):
        for step in range(at, at + count):
            where = batch_at(step), *epochs.seen(step), step
            state, metrics = program.one(state, teacher, *where)
            dispatched[:] = jax.tree.leaves(metrics)
        return state, metrics

    def upcoming(program, at):
        looked_at[at] = batch_at(at)
        return program.batch(looked_at[at], *epochs.seen(at), at)

    def lower(program, *state):
        looked_at[0] = batch_at(0)
        return program.one.lower(*state, looked_at[0], *epochs.seen(0), 0)

    def waited() -> float:
        nonlocal seconds
        since, seconds = seconds, 0.0
        return since

    return Feed(
        advance=advance,
        example=epochs.example(read(np.arange(batch_size, dtype=np.int32), 0)),
        data=Data(train.labels(np.arange(train.n))),
        per_epoch=epochs.steps,
        lower=lower,
        upcoming=upcoming,
        waited=waited,
    )


class _Epochs(NamedTuple):
    """The order of the examples, and how each step shows them; the same in all feeds.

    Attributes:
        n: number of examples.
        steps: number of steps in an epoch.
        batch_size: number of examples in a step.
        orders: the key of the orders.
        seen: `(step of the run) -> (statistics, view or key of its crops)`.
        mesh: the mesh of the run.
    """

    n: int
    steps: int
    batch_size: int
    orders: Key[Array, ""]
    seen: Callable[[int], tuple[Any, Any]]
    mesh: Mesh | None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        batch_size: int,
        key: Key[Array, ""],
        mesh: Mesh | None,
        views: UInt8[np.ndarray, "views n 3"] | None,
    ) -> "_Epochs":
        """The epochs of a run."""
        n, steps = dataset.train.n, steps_per_epoch(dataset.train.n, batch_size)
        orders, crops = jax.random.split(key)
        standardize = _on(mesh, replicated, dataset.standardize)
        drawn = None if views is None else _on(mesh, replicated, views)

        @lru_cache(maxsize=1)
        def view(epoch: int) -> Any:
            return crops if drawn is None else view_of(drawn, epoch)

        def seen(at: int) -> tuple[Any, Any]:
            return standardize, view(at // steps)

        return cls(n, steps, batch_size, orders, seen, mesh)

    def order(self, epoch: int) -> Int32[Array, " n"]:
        """The order of an epoch."""
        return order(jax.random.fold_in(self.orders, epoch), self.n)

    def example(self, batch: Mapping[str, Any]) -> Batch:
        """A batch that was read, without crops and flips."""
        standardize, crops = self.seen(0)
        view = crops if isinstance(crops, View) else None
        return _on(self.mesh, over_batch, shown(batch, standardize, view=view))


def _on(mesh: Mesh | None, where: Callable[[Mesh], Any], arrays: PyTree) -> PyTree:
    """Places arrays by a sharding of the mesh; without a mesh, on the device."""
    if mesh is None:
        return jax.device_put(arrays)
    return spread(arrays, where(mesh))
