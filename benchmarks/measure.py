"""How the benchmarks measure: separate compilation, interleaved rounds, paired ratios.

The speed of a machine changes for seconds at a time. So every round runs all programs,
in a new order, and a ratio divides two times of the same round. The reported ratio is
the median over rounds, with the interval that order statistics give.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FEWEST_ROUNDS = 6  # fewer have no interval with 95 % confidence


class Program(NamedTuple):
    """A compiled function, with the compiler's estimates of its cost.

    `flops`, `bytes_accessed` and `temp_bytes` are None if the backend does not report
    them.
    """

    call: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    flops: float | None
    bytes_accessed: float | None
    temp_bytes: int | None

    def record(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Everything but the function itself, with the seconds of its steps."""
        told = self._asdict()
        told.pop("call")
        return told | {"step_seconds": summary(seconds), "rounds": list(seconds)}


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark, with those that all have: `--small` and `--out`.

    Args:
        text: the first lines of the benchmark's file.
    """
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--small", action="store_true", help="run a tiny case, as a test")
    made.add_argument("--out", type=Path, help="JSON file to write the results to")
    return made


def add_runs(made: argparse.ArgumentParser, dataset: str, seeds: int) -> None:
    """Adds the options of a benchmark that trains students over some seeds.

    Args:
        made: the options of the benchmark.
        dataset: the usual dataset.
        seeds: the usual number of runs of each arm.
    """
    add = made.add_argument
    add("--dataset", default=dataset, help="as for `hintjax distill`")
    add("--data-dir", help="where prepared sets are")
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--seeds", type=int, default=seeds, help="runs of each arm")
    add("--work", type=Path, required=True, help="directory of the runs")


def factory(name: str) -> Any:
    """The object that `package.module:factory` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a jitted function; every array that it needs must be an argument.

    An array in the function's closure becomes a constant, and XLA spends minutes on
    folding convolutions of constants.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    costs, memory = program.cost_analysis() or {}, program.memory_analysis()
    return Program(
        call=program,
        trace_seconds=traced - start,
        compile_seconds=done - traced,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def running(
    call: Callable[..., Any], state: Any, rest: Sequence[Any]
) -> Callable[[], Any]:
    """A function that makes one step and keeps the new state, since steps donate it."""

    def run() -> Any:
        nonlocal state
        state, shown = call(state, *rest)
        return state, shown

    return run


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Measures the seconds per step of every run, once in each round.

    Args:
        runs: functions by name; each call makes one step and returns its outputs.
        rounds: number of rounds; each times every run once, in a random order.
        steps: steps that are dispatched one after another in one measurement.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in runs}
    shuffle = np.random.default_rng(0)
    for _ in range(rounds):
        for name in shuffle.permutation(list(runs)):
            start = time.perf_counter()
            for _ in range(steps):
                outputs = runs[name]()
            jax.block_until_ready(outputs)
            seconds[name].append((time.perf_counter() - start) / steps)
    for name, run in runs.items():
        numbers = [
            leaf
            for leaf in jax.tree.leaves(run())
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        if not all(jnp.isfinite(leaf).all() for leaf in numbers):
            raise FloatingPointError(
                f"{name}: expected finite numbers after the last round, got nan or "
                f"inf. Lower the learning rate."
            )
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """The median, with a 95 % confidence interval.

    The ends of the interval are order statistics: of n values, the number below the
    true median is binomial (n, 1/2) for every distribution. Fewer than 6 values have no
    such interval; then the ends are the extremes, and they prove nothing.
    """
    ordered, n = np.sort(values), len(values)
    outside, low = 0.5**n, 0  # the chance that the median is below ordered[low]
    while outside + math.comb(n, low + 1) * 0.5**n <= 0.025:
        low += 1
        outside += math.comb(n, low) * 0.5**n
    return {
        "median": float(np.median(ordered)),
        "low": float(ordered[low]),
        "high": float(ordered[n - 1 - low]),
    }


def paired(
    seconds: Mapping[str, Sequence[float]], whole: str, parts: Sequence[str]
) -> dict[str, float]:
    """The `summary` of one run's time divided by the sum of others', in each round."""
    below = sum(np.asarray(seconds[part]) for part in parts)
    return summary(np.asarray(seconds[whole]) / below)


def verdict(
    bar: float | None, time: Mapping[str, float], flops: float | None, rounds: int
) -> str:
    """Compares the interval with the bar; if the bar is inside, FLOPs decide."""
    if bar is None:
        return ""
    if rounds >= FEWEST_ROUNDS and not time["low"] <= bar < time["high"]:
        return "within" if time["high"] <= bar else "above"
    if flops is None:
        return "undecided"
    return "within by FLOPs" if flops <= bar else "above by FLOPs"


def machine() -> dict[str, Any]:
    """The machine, the date and the versions of a measurement."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "hintjax")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the record as JSON; measured numbers have five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _processor() -> str:
    """The name of the CPU, or the machine type if Linux does not give the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _rounded(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _rounded(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_rounded(value) for value in node]
    return float(f"{node:.5g}") if isinstance(node, float) and node < 1e6 else node
