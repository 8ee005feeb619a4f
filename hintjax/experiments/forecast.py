"""The cost of a run before it trains: operations, memory, time, and disk.

The steps are compiled on shapes alone. On one device JAX keeps what it compiled, so the
run compiles nothing again, and the check of the memory costs nothing more.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import Refusal, message
from hintjax.experiments.caching import planned_cache
from hintjax.experiments.devices import forward_flops
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.run import feed_of, phases_of
from hintjax.experiments.setting import Setting
from hintjax.networks import Network, Variables
from hintjax.sharding import place, shares
from hintjax.stages import State
from hintjax.training import Feed, Phase
from hintjax.training.phase import begin

_TIMED = 5  # steps, after one that is not timed
_KEPT = 4  # checkpoints: the best, the two newest, and one that is being written


class Step(NamedTuple):
    """The compiled step of a phase.

    Attributes:
        phase: the phase.
        state: the state that it starts from, or its shapes.
        nbytes: the memory that a device needs for the step, in bytes; None if the
            backend does not tell it.
        flops: the number of floating-point operations; None likewise.
    """

    phase: Phase
    state: State
    nbytes: int | None
    flops: float | None


def check_memory(setting: Setting, recipes: Sequence[Recipe]) -> None:
    """Compiles the steps of all runs, and refuses a step that needs too much memory.

    Steps with --debug are not checked: they are compiled in another form. Nor are those
    of several processes.

    Args:
        setting: setting of the runs.
        recipes: recipes of the runs.

    Raises:
        Refusal: if a step does not fit, with a number of micro-batches that fits.
    """
    there = available()
    if there is None or jax.process_count() > 1 or setting.config.debug:
        return
    setting = planned_cache(setting, recipes)
    feed = feed_of(setting, setting.config, jax.random.key(0))
    for phase, nbytes in _needed(setting, recipes, feed):
        if nbytes is not None and nbytes > there:
            got = f"{_mb(nbytes)} for {phase}, batch {setting.config.batch_size}"
            _refuse(setting, recipes, feed, got, there)


def _needed(
    setting: Setting, recipes: Sequence[Recipe], feed: Feed
) -> Iterator[tuple[str, int | None]]:
    """The memory that the step of each phase takes of the `available` memory.

    On a mesh the arrays are made, because their shapes do not tell where they are.
    """
    make = jax.eval_shape if setting.layout is None else _made
    for step in compiled_steps(setting, recipes, feed, make):
        nbytes = step.nbytes
        yield step.phase.name, nbytes and nbytes * _in_one_memory(setting)


def _in_one_memory(setting: Setting) -> int:
    """The number of the run's devices whose arrays are in one memory."""
    if setting.layout is None or jax.default_backend() != "cpu":
        return 1
    return shares(setting.layout.mesh)


def _refuse(
    setting: Setting, recipes: Sequence[Recipe], feed: Feed, got: str, there: int
) -> None:
    """Raises an error with the least number of micro-batches that fits."""
    config = setting.config
    wanted = f"steps that fit into the {_mb(there)} of memory that are free"
    do = "Use a smaller student or teacher, or a method with smaller features."
    for parts in range(2 * config.accumulate, config.batch_size + 1):
        if config.batch_size % parts or parts & (parts - 1):
            continue
        divided = dataclasses.replace(config, accumulate=parts)
        tried = setting._replace(config=divided, programs={})
        needed = [nbytes for _, nbytes in _needed(tried, recipes, feed)]
        if all(nbytes is not None and nbytes <= there for nbytes in needed):
            size = config.batch_size // parts
            do = f"Use --accumulate {parts}, or --batch-size {size}."
            break
    raise Refusal(message("distill", wanted, got, do))


def compiled_steps(
    setting: Setting,
    recipes: Sequence[Recipe],
    feed: Feed,
    make: Callable[..., Any] = jax.eval_shape,
) -> Iterator[Step]:
    """Compiles the steps of all phases; phases that share a program have one step.

    Args:
        setting: setting of the runs.
        recipes: recipes of the runs.
        feed: batches of the runs.
        make: `(function, *arguments) -> result`; by default the result's shapes.
    """
    key, done = jax.random.key(0), set()
    student, teacher = (
        None if network is None else make(network.init, key, setting.inputs)
        for network in (setting.student, setting.teacher)
    )
    if teacher is not None and setting.layout is not None:
        teacher = place(teacher, setting.layout)
    for recipe in recipes:
        config, places = setting.config, setting.places
        planned = recipe(config, places, feed.per_epoch)
        phases = phases_of(setting, config, planned, feed.per_epoch, teacher)
        state = None
        for number, phase in enumerate(phases):
            starting = functools.partial(_begun, phases, feed, number)
            state = make(starting, phase.teacher, student, state)
            if id(phase.program) in done:
                continue
            done.add(id(phase.program))
            lowered = feed.lower(phase.program, state, phase.teacher)
            yield _step(phase, state, lowered.compile())


def _begun(
    phases: Sequence[Phase],
    feed: Feed,
    number: int,
    teacher: Variables | None,
    student: Variables,
    earlier: State | None,
) -> State:
    """The state that a phase starts from."""
    taught = [phase._replace(teacher=teacher) for phase in phases]
    return begin(taught, feed, jax.random.key(0), number, student, earlier)


def _step(phase: Phase, state: State, compiled: jax.stages.Compiled) -> Step:
    """A compiled step, with the estimates of the compiler."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    nbytes = None
    if memory is not None:
        # Donated arguments are also results.
        nbytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
        nbytes += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return Step(phase, state, nbytes, (costs or {}).get("flops"))


def available() -> int | None:
    """The bytes that one device has for a run; None if nothing tells them.

    An accelerator's memory belongs to the run. A CPU's memory belongs to all processes,
    so the memory that is free now counts.
    """
    device = jax.local_devices()[0]
    told = (device.memory_stats() or {}).get("bytes_limit")
    if told is not None or device.platform != "cpu":
        return told
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(free[0]) if free else None


def show_forecast(setting: Setting, recipes: Sequence[Recipe], runs: int) -> None:
    """Prints the cost of runs; nothing is trained or written.

    Args:
        setting: setting of the runs.
        recipes: recipes of the runs.
        runs: number of runs.
    """
    config = setting.config
    for who, name, network in (
        ("student", config.student, setting.student),
        ("teacher", config.teacher, setting.teacher),
    ):
        if network is not None:
            print(f"{who} {name}: {_network(network, setting.inputs)}")
    setting = planned_cache(setting, recipes)
    if setting.cache is not None:
        row, total = setting.cache.contents.nbytes, setting.cache.rows.nbytes
        print(f"cache: {row} bytes per view of an image, {_mb(total)} in all")
    feed = feed_of(setting, config, jax.random.key(0))
    largest, saved = 0, 0
    for step in compiled_steps(setting, recipes, feed, make=_made):
        largest = max(largest, step.nbytes or 0)
        saved = max(saved, _nbytes(step.state))
        seconds = _timed(step, feed)
        per_epoch = feed.per_epoch * seconds
        parts = 1 if setting.layout is None else shares(setting.layout.mesh)
        steps = _count(feed.per_epoch, "step")
        epochs = _count(step.phase.steps // feed.per_epoch, "epoch")
        each = None if step.flops is None else parts * step.flops / config.batch_size
        print(
            f"{step.phase.name}: {_flops(each)} per image in a step, {_mb(step.nbytes)}"
            f" of memory, {1e3 * seconds:.3g} ms per step, {per_epoch:.3g} s per epoch "
            f"of {steps}, {epochs}"
        )
    there = available()
    known = "unknown" if there is None else _mb(there)
    together = _in_one_memory(setting)
    whose = "memory" if together > 1 else "memory of a device"
    print(f"{whose}: {_mb(together * largest)} needed, {known} available")
    disk = runs * _KEPT * saved
    print(f"checkpoints: {_mb(disk)} on disk, at most, for {_count(runs, 'run')}")


def _network(network: Network, inputs: jax.Array) -> str:
    """The number of parameters and of operations of a network, as text."""
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables.params)]
    flops = forward_flops(network, variables, inputs)
    return f"{sum(sizes):,} parameters, {_flops(flops)} per image forward"


def _timed(step: Step, feed: Feed) -> float:
    """The median of the seconds of some steps."""
    phase, seconds = step.phase, []
    state = jax.tree.map(lambda leaf: leaf.copy(), step.state)  # steps donate it
    for at in range(_TIMED + 1):
        start = time.perf_counter()
        state, metrics = feed.advance(
            phase.program, state, phase.teacher, at % feed.per_epoch, 1
        )
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _made(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _nbytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _count(n: int, noun: str) -> str:
    """A number with its noun, such as "1 run" or "2 runs"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _mb(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 1e6:,.1f} MB"


def _flops(count: float | None) -> str:
    return "unknown FLOPs" if count is None else f"{count / 1e6:,.1f} MFLOP"
