"""Micro-batches: memory and time of an update, for several numbers of micro-batches.

    python benchmarks/accumulation.py --out benchmarks/results/accumulation_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 4 there. Expected,
relative to one whole batch: temporary memory 0.70 with 2 micro-batches, 0.40 with 4 and
0.25 with 8, and the same FLOPs. A step takes the same time, or 0.8 of it on machines
that are faster with less memory.

WRN-40-2 teaches WRN-16-2 with the task loss, KD and FitNets' hint, batch 64, images
32x32x3, 100 classes. Every update uses the same 64 examples. Temporary memory is the
memory that the compiler plans for one step in addition to arguments and results. All
numbers of micro-batches are timed in the same rounds.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import measure
import optax

import hintjax as hj
from hintjax.models import WideResNet

CLASSES = 100
HINT = [("group2", "group2")]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    programs, runs = {}, {}
    for count in options.counts:
        update, state, rest = _step(options, count)
        programs[count] = measure.compiled(update, state, *rest)
        runs[count] = measure.running(programs[count].call, state, rest)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    first, *_ = options.counts
    record = {
        "benchmark": "accumulation",
        "machine": machine,
        "teacher": options.teacher,
        "student": options.student,
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "rounds": options.rounds,
        "steps": options.steps,
        "programs": {
            count: program.record(seconds[count]) for count, program in programs.items()
        },
        "ratios": {
            count: measure.paired(seconds, count, (first,)) for count in programs
        },
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _step(
    options: argparse.Namespace, count: int
) -> tuple[Callable[..., Any], hj.State, tuple[Any, ...]]:
    """Update, state and other arguments of a stage with `count` micro-batches."""
    # The default generator of random weights takes 20 seconds to compile on CPU.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    shape = (options.batch, options.size, options.size, 3)
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jax.random.randint(keys[1], shape[:1], 0, CLASSES),
    }
    teacher, student = (
        hj.linen(measure.factory(name)(classes=CLASSES))
        for name in (options.teacher, options.student)
    )
    taught = teacher.init(keys[2], batch["image"])
    start = student.init(keys[3], batch["image"])
    objective = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        hint=hj.fitnets(HINT),
    )
    # With so small a rate, hundreds of steps on random data stay finite.
    optimizer = optax.sgd(1e-6, momentum=0.9)
    stage = hj.distillation_stage(
        student, teacher, objective, optimizer, accumulate=count
    )
    state = stage.init(keys[4], start, taught, batch)
    return stage.update, state, (taught, batch)


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"{record['teacher']} -> {record['student']}, batch {record['batch']}, "
        f"{record['rounds']} rounds of {record['steps']} on {machine['device']} "
        f"({machine['processor']}), jax {machine['versions']['jax']}"
    )
    heading = (
        f"{'micro-batches':>13}{'compile s':>11}{'temp MB':>9}{'GFLOP':>8}"
        f"{'step ms':>9}{'over the first':>16}{'95 %':>16}"
    )
    lines = [setting, "", heading]
    for count, program in record["programs"].items():
        time, ratio = program["step_seconds"], record["ratios"][count]
        interval = f"{ratio['low']:.3f} - {ratio['high']:.3f}"
        lines.append(
            f"{count:>13}{program['compile_seconds']:11.1f}"
            f"{_shown(program['temp_bytes'], 1e6):>9}{_shown(program['flops'], 1e9):>8}"
            f"{1e3 * time['median']:9.1f}{ratio['median']:16.3f}{interval:>16}"
        )
    return "\n".join(lines)


def _shown(number: float | None, unit: float) -> str:
    return "-" if number is None else f"{number / unit:.1f}"


def wrn_10_1(classes: int) -> WideResNet:
    """The network of `--small`."""
    return WideResNet(10, 1, classes)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="hintjax.models:wrn_40_2", help="package.module:factory")
    add("--student", default="hintjax.models:wrn_16_2", help="package.module:factory")
    add(
        "--counts",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="numbers of micro-batches",
    )
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--rounds", type=int, default=10, help="rounds to measure")
    on_cpu = jax.default_backend() == "cpu"
    add("--steps", type=int, default=1 if on_cpu else 20, help="steps in a round")
    options = parser.parse_args(arguments)
    if options.small:
        options.teacher = options.student = f"{__name__}:wrn_10_1"
        options.batch, options.size, options.counts = 4, 8, [1, 2]
    return options


if __name__ == "__main__":
    # A cache would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
