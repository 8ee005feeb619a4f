"""Single convolutions and their gradients, in XLA on a CPU and in torch.

    python3 -m venv .venv-torch && .venv-torch/bin/pip install torch numpy
    python benchmarks/convolutions.py --torch .venv-torch/bin/python --out FILE

Device: CPU. Leave the machine alone meanwhile; it takes two minutes. It tells where the
time of `against_torch.py` goes: nearly all operations of its steps are the 3x3
convolutions of WRN-16-2 and WRN-40-2, which are timed here one by one. The teacher runs
them forward, the student also computes the gradients of inputs and kernels.

XLA runs in two processes, as users have it, and with its convolutions and not their
YNNPACK forms (`XLA_FLAGS` of `WITHOUT`; only jaxlib 0.10 has the choice). torch runs
its default layout and channels last, and the faster one counts. Each round times all
programs once, in a new order. A ratio divides the times of one round.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
import worker

FOLDER = Path(__file__).parent
WITHOUT = "--xla_cpu_experimental_ynn_fusion_type=dot,reduce"
# Height and width, channels before and after, stride.
SHAPES = {
    "32x32, 16 to 32": (32, 16, 32, 1),
    "32x32, 32 to 32": (32, 32, 32, 1),
    "32x32, 32 to 64, stride 2": (32, 32, 64, 2),
    "16x16, 64 to 64": (16, 64, 64, 1),
    "16x16, 64 to 128, stride 2": (16, 64, 128, 2),
    "8x8, 128 to 128": (8, 128, 128, 1),
}
SMALL = {"8x8, 4 to 4": (8, 4, 4, 1)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    shapes = SMALL if options.small else SHAPES
    if options.worker:
        return _serve(options.batch, shapes)
    mine = [sys.executable, __file__, "--worker", "--batch", f"{options.batch}"]
    mine += ["--small"] if options.small else []
    asked = json.dumps([options.batch, shapes])
    workers = {
        "torch": worker.Worker(
            [options.torch, str(FOLDER / "torch_convolutions.py"), asked],
            {"OMP_WAIT_POLICY": "passive"},
        ),
        "XLA": worker.Worker(mine),
    }
    if jax.lib.__version__.startswith("0.10."):
        workers["XLA without YNNPACK"] = worker.Worker(mine, {"XLA_FLAGS": WITHOUT})
    seconds: dict[tuple[str, str], list[float]] = {
        (who, name): [] for who, one in workers.items() for name in one.programs
    }
    keys, shuffle = list(seconds), np.random.default_rng(0)
    for _ in range(options.rounds):
        for at in shuffle.permutation(len(keys)):
            who, name = keys[at]
            seconds[keys[at]].append(workers[who].seconds(name, options.times))
    for one in workers.values():
        one.close()
    record = {
        "benchmark": "convolutions",
        "machine": measure.machine(),
        "about": {who: one.about for who, one in workers.items()},
        "batch": options.batch,
        "rounds": options.rounds,
        "times": options.times,
        "convolutions": _compared(options.batch, shapes, seconds),
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _compared(
    batch: int,
    shapes: dict[str, tuple[int, ...]],
    seconds: dict[tuple[str, str], list[float]],
) -> dict[str, Any]:
    """For each program: operations, seconds of all sides, and ratios over torch."""
    found = {}
    for title, (side, before, after, stride) in shapes.items():
        flops = 2 * 9 * before * after * batch * (side // stride) ** 2
        for part in ("forward", "input gradient", "kernel gradient"):
            name = f"{title}, {part}"
            torch = min(
                (
                    times
                    for (who, one), times in seconds.items()
                    if who == "torch" and one.startswith(f"{name}, ")
                ),
                key=np.median,
            )
            ours = {who: times for (who, one), times in seconds.items() if one == name}
            found[name] = {
                "operations": flops,
                "seconds": {
                    who: measure.summary(times)
                    for who, times in {"torch": torch, **ours}.items()
                },
                "over_torch": {
                    who: measure.summary(np.divide(times, torch))
                    for who, times in ours.items()
                },
            }
    return found


def _serve(batch: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compiles the programs in this process, and times them when asked."""
    programs = {
        f"{title}, {part}": partial(_timed, run)
        for title, shape in shapes.items()
        for part, run in _programs(batch, *shape).items()
    }
    worker.serve(programs, measure.machine())


def _programs(
    batch: int, side: int, before: int, after: int, stride: int
) -> dict[str, Callable[[], jax.Array]]:
    """A 3x3 convolution and its two gradients."""
    random = np.random.default_rng(0)
    small = side // stride
    image, kernel, gradient = (
        jax.device_put(random.standard_normal(shape, np.float32))
        for shape in (
            (batch, side, side, before),
            (3, 3, before, after),
            (batch, small, small, after),
        )
    )

    def forward(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def of_input(kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        linear = partial(forward, kernel=kernel)
        return jax.linear_transpose(linear, image)(gradient)[0]

    def of_kernel(image: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(partial(forward, image), kernel)(gradient)[0]

    return {
        "forward": partial(jax.jit(forward), image, kernel),
        "input gradient": partial(jax.jit(of_input), kernel, gradient),
        "kernel gradient": partial(jax.jit(of_kernel), image, gradient),
    }


def _timed(run: Callable[[], jax.Array], times: int) -> float:
    """Seconds of one run, from several."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(times):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times


def table(record: dict[str, Any]) -> str:
    """The record as text: operations per nanosecond of each side, and ratios."""
    sides = [who for who in record["about"] if who != "torch"]
    machine, torch = record["machine"], record["about"]["torch"]
    jax_version = machine["versions"]["jax"]
    heads = "".join(f"{who:>26}" for who in sides)
    lines = [
        f"batch {record['batch']} on {machine['processor']}",
        f"jax {jax_version}, torch {torch['torch']}",
        f"{'GFLOP/s; times over torch':44}{'torch':>7}{heads}",
    ]
    for name, row in record["convolutions"].items():
        line = f"{name:44}{_speed(row, 'torch'):7.0f}"
        for who in sides:
            ratio = row["over_torch"][who]["median"]
            line += f"{_speed(row, who):18.0f}{ratio:8.2f}"
        lines.append(line)
    return "\n".join(lines)


def _speed(row: dict[str, Any], who: str) -> float:
    """Operations per nanosecond."""
    return row["operations"] / row["seconds"][who]["median"] / 1e9


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch", help="a Python with torch and numpy")
    add("--batch", type=int, default=64, help="images in a batch")
    add("--rounds", type=int, default=10, help="rounds to measure")
    add("--times", type=int, default=5, help="runs of a program in a round")
    add("--small", action="store_true", help="time a tiny convolution, as a test")
    add("--out", type=Path, help="JSON file to write the results to")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.torch and not options.worker:
        parser.error("expected --torch, the path of a Python with torch and numpy")
    return options


if __name__ == "__main__":
    main()
