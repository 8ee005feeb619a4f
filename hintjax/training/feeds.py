"""Feeds: the batches of training, from the device or from Grain."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree, UInt8

from hintjax._checks import Refusal, WrongType, message
from hintjax.data import (
    Augment,
    Dataset,
    Split,
    View,
    order,
    place,
    steps_per_epoch,
    stream,
    take,
    view_of,
)
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
        one: makes one batch and one step.
        many: makes `count` steps in one dispatch.
        batch: makes one batch alone.
    """

    stage: Stage
    one: Callable[..., tuple[State, Metrics]]
    many: Callable[..., tuple[State, Metrics]]
    batch: Callable[..., Batch]


class Feed(NamedTuple):
    """Trains on batches from one source.

    Attributes:
        advance: `(program, state, teacher, at, count) -> (state, metrics)`: makes the
            steps `at` to `at + count` of the run.
        example: one batch, for its shapes.
        data: size and labels of the training set.
        per_epoch: steps in an epoch.
        position: gives the position in the source, for a checkpoint; JSON.
        seek: goes to a position that `position` gave.
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
    position: Callable[[], Any]
    seek: Callable[[Any], None]
    lower: Callable[..., jax.stages.Lowered]
    upcoming: Callable[[Program, int], Batch]
    waited: Callable[[], float] = lambda: 0.0


def program(
    stage: Stage,
    batch_size: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles a stage together with `take`, for data that is on the device.

    Args:
        stage: the stage.
        batch_size: examples in a step.
        augment: crops and flips.
        mesh: the stage's mesh, if it has one.

    Returns:
        The program; nothing is compiled before its first call.
    """
    augment = augment or Augment()

    def batch_of(train, standardize, epoch, crops, at, position):
        index = jax.lax.dynamic_slice(epoch, (position * batch_size,), (batch_size,))
        key = view = None
        if isinstance(crops, View):
            view = crops
        else:
            key = jax.random.fold_in(crops, at)
        batch = take(train, index, standardize, key=key, augment=augment, view=view)
        if mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, over_batch(mesh))
        return batch

    def body(state, teacher, train, standardize, epoch, crops, at, position):
        batch = batch_of(train, standardize, epoch, crops, at, position)
        return stage.step(state, stage.teach(state, teacher, batch), batch)

    def many(state, teacher, train, standardize, epoch, crops, at, position, count):
        def one(state, i):
            return body(
                state, teacher, train, standardize, epoch, crops, at + i, position + i
            )

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

    The order changes with every epoch. The step of the run alone tells the position.

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
    n, per_epoch = dataset.train.n, steps_per_epoch(dataset.train.n, batch_size)
    orders, crops = jax.random.split(key)
    everywhere = None if mesh is None else replicated(mesh)
    train = place(dataset.train, everywhere)
    standardize = _on(mesh, replicated, dataset.standardize)
    drawn = None if views is None else _on(mesh, replicated, views)
    current: dict[int, tuple[Array, Any]] = {}

    def place_of(at: int) -> tuple[Any, ...]:
        """The data, and the order and the place of a step in it."""
        epoch, position = divmod(at, per_epoch)
        if epoch not in current:
            current.clear()
            shuffled = order(jax.random.fold_in(orders, epoch), n)
            seen = crops if drawn is None else view_of(drawn, epoch)
            current[epoch] = _on(mesh, replicated, shuffled), seen
        return train, standardize, *current[epoch], at, position

    def advance(program, state, teacher, at, count):
        where = place_of(at)
        if count == 1:
            return program.one(state, teacher, *where)
        return program.many(state, teacher, *where, count=count)

    view = None if drawn is None else view_of(drawn, 0)
    first = take(train, jnp.arange(batch_size), standardize, view=view)
    return Feed(
        advance=advance,
        example=_on(mesh, over_batch, first),
        data=Data(train.label),
        per_epoch=per_epoch,
        position=lambda: None,
        seek=lambda position: None,
        lower=lambda program, *state: program.one.lower(*state, *place_of(0)),
        upcoming=lambda program, at: program.batch(*place_of(at)),
    )


def streamed(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    mesh: Mesh | None = None,
    views: UInt8[np.ndarray, "views n 3"] | None = None,
    also: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Feed:
    """Batches of a training split that does not fit on the device, by Grain.

    Args:
        dataset: its training split is read from the host's memory or from disk.
        batch_size: examples in a step, over all processes together.
        seed: the seed of the order, the crops and the flips.
        augment: crops and flips, made on the host.
        mesh: the mesh over which a batch is split. Each process reads its own part of
            the batch.
        views: fixed crops and flips; see `on_device`.
        also: `(batch) -> batch` on the host, which may add entries to a batch, such as
            the features of a cached teacher.

    Returns:
        The feed. Its position is that of Grain, and the same in all processes.
    """
    train, processes = dataset.train, jax.process_count()
    if batch_size % processes:
        do = f"Use a multiple of {processes}."
        wanted = f"a batch size that {processes} processes can share"
        raise Refusal(message("streamed", wanted, f"{batch_size}", do))
    batches: Any = stream(  # an iterator of Grain, with a position
        train,
        batch_size // processes,
        dataset.standardize,
        augment=augment or Augment(),
        crops=views,
        seed=seed,
        process_index=jax.process_index(),
        process_count=processes,
    )

    dispatched, seconds = [], 0.0  # arrays of the last step; waited since last asked
    ahead = []  # the batch that was looked at, and the position before it

    def following() -> Mapping[str, Any]:
        nonlocal seconds
        if ahead:
            return ahead.pop()[0]
        start = time.perf_counter()
        batch = also(next(batches))
        # While an earlier step still runs, a late batch delays nothing. If that step
        # has ended by now, the whole wait counts.
        if all(array.is_ready() for array in dispatched):
            seconds += time.perf_counter() - start
        return batch if mesh is None else from_process(batch, mesh)

    start = batches.get_state()
    example = following()
    batches.set_state(start)

    def advance(program, state, teacher, at, count):
        for _ in range(count):
            state, metrics = program.stage.update(state, teacher, following())
            dispatched[:] = jax.tree.leaves(metrics)
        return state, metrics

    def upcoming(program, at):
        if not ahead:
            before = batches.get_state()
            ahead.append((following(), before))
        return ahead[0][0]

    def seek(position):
        ahead.clear()
        batches.set_state(position)

    def waited() -> float:
        nonlocal seconds
        since, seconds = seconds, 0.0
        return since

    return Feed(
        advance=advance,
        example=example,
        data=Data(train.labels(np.arange(train.n))),
        per_epoch=steps_per_epoch(train.n, batch_size),
        position=lambda: ahead[0][1] if ahead else batches.get_state(),
        seek=seek,
        lower=lambda program, *state: program.stage.update.lower(*state, example),
        upcoming=upcoming,
        waited=waited,
    )


def _on(mesh: Mesh | None, where: Callable[[Mesh], Any], arrays: PyTree) -> PyTree:
    """Places arrays by a sharding of the mesh; without a mesh, on the device."""
    if mesh is None:
        return jax.device_put(arrays)
    return spread(arrays, where(mesh))
