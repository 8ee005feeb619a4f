"""The cost of one of n students under one teacher, relative to a run of its own.

    python benchmarks/population.py --out benchmarks/results/population_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 9 there, on a
machine with other work. Expected for one of 8 students: apart 0.7 for both networks;
together 3.5 for the CNN and 0.9 for the ViT.

The objective is the task, KD and a hint of the middle layer, with batch 16 and images
32x32x3, for a CNN (resnet20 teaches resnet8) and a ViT (vit_mini teaches vit_micro,
both with patches of 4x4). Forms, for n = 1, 2, 4, 8 students:

    together   one program: the teacher, and jax.vmap over the students
    apart      a program for the teacher, then one that runs for each student
    mesh       one program for several devices; each device has its own students,
               together or apart by the default of the device; the number of devices
               divides n and is at least two

Each form is compared, in the same rounds, with `alone`, the `stage.update` of one
student. The cost of a student is the time of a step of all n students, divided by n and
by the time of `alone`. The last column is the same ratio of the floating-point
operations that the compiler counts on each device: the cost if every operation took the
same time.

The committed numbers decide the default of `hintjax.population`. On CPUs, students take
turns with the same teacher's features, which saves most of the operations that can be
saved (0.68 and 0.73 of a separate run's time, 0.56 and 0.54 of its operations).
Students with convolutions cost more together than in separate runs, and more with their
number (1.8 for two, 3.5 for eight), although the number of operations is as low. ViTs
cost as much together as in separate runs. On other devices students are together by
default; run the benchmark there.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import measure
import numpy as np
import optax

import hintjax as hj
from hintjax import models, sharding

CLASSES = 10
NETWORKS = {  # student and teacher
    "cnn": (models.resnet8, models.resnet20),
    "vit": (partial(models.vit_micro, patch=4), models.vit_mini),
}
SMALL = {
    "cnn": (partial(models.plain_thin, depth=3),) * 2,
    "vit": (partial(models.VisionTransformer, 4, 8, 2, 2),) * 2,
}
KEY = jax.random.key(0, impl="rbg")  # the default kind compiles slowly on CPU


class Setting(NamedTuple):
    """A stage, the first variables of its students, and other arguments of its step."""

    stage: hj.Stage
    ours: hj.Variables
    rest: tuple[hj.Variables, dict[str, jax.Array]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    networks = SMALL if options.small else NETWORKS
    record = {
        "benchmark": "population",
        "machine": machine,
        "devices": jax.device_count(),
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "rounds": options.rounds,
        "steps": options.steps,
        "networks": {
            name: _measured(_setting(*pair, options), options)
            for name, pair in networks.items()
        },
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _measured(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all forms and numbers of students, for one pair of networks."""
    stage, ours, rest = setting
    state = stage.init(KEY, ours, *rest)
    alone = measure.compiled(stage.update, state, *rest)
    teach = measure.compiled(jax.jit(partial(stage.teach, None)), *rest)
    # The program that runs for each student if students take turns.
    parts = (state, teach.call(*rest), rest[1])
    step = measure.compiled(jax.jit(stage.step), *parts)
    runs = {"teach": partial(teach.call, *rest)}
    in_turn = hj.population(stage, 1, together=False).update  # is the same for all n
    flops = {}
    for n in options.students:
        for form, how in _forms(n).items():
            crowd = hj.population(stage, n, **how)
            members = crowd.init(jax.random.split(KEY, n), ours, *rest)
            name, update, others = f"{form} {n}", crowd.update, rest
            if form == "mesh":
                others = jax.device_put(rest, sharding.replicated(how["mesh"]))
            if form == "apart":  # several programs
                update, counts = in_turn, (teach.flops, *[step.flops] * n)
            else:
                program = measure.compiled(update, members, *others)
                update, counts = program.call, (program.flops,)
            runs[name] = measure.running(update, members, others)
            flops[name] = None if None in counts else sum(counts)
    runs["alone"] = measure.running(alone.call, state, rest)
    seconds = measure.interleave(runs, options.rounds, options.steps)

    def student(name: str) -> dict[str, Any]:
        n = int(name.split()[1])
        ratios = np.divide(seconds[name], seconds["alone"]) / n
        counts = (flops[name], alone.flops)
        return {
            "cost": measure.summary(ratios),
            "flops": None if None in counts else counts[0] / n / counts[1],
        }

    return {
        "alone": alone.record(seconds["alone"]),
        "teach": teach.record(seconds["teach"]),
        "students": {name: student(name) for name in flops},
        "seconds": seconds,
    }


def _forms(n: int) -> dict[str, dict[str, Any]]:
    """The arguments of `population`, by the name of the form."""
    devices = gcd(n, jax.device_count())
    forms = {"together": {"together": True}, "apart": {"together": False}}
    if devices > 1:
        forms["mesh"] = {"mesh": hj.data_mesh(jax.devices()[:devices])}
    return forms


def _setting(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    options: argparse.Namespace,
) -> Setting:
    """A stage for one student, with random weights and data."""
    keys = jax.random.split(KEY, 4)
    shape = (options.batch, options.size, options.size, 3)
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jax.random.randint(keys[1], shape[:1], 0, CLASSES),
    }
    networks = [hj.linen(make(classes=CLASSES)) for make in (student, teacher)]
    ours, theirs = (
        network.init(key, batch["image"])
        for network, key in zip(networks, keys[2:], strict=True)
    )
    layers = (
        network.layers(*variables, batch["image"])
        for network, variables in zip(networks, (ours, theirs), strict=True)
    )
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        hint=hj.weighted(hj.fitnets(hj.suggest_pairs(*layers)), hj.Adjustable(1.0)),
    )
    # With so small a rate, hundreds of steps on random data stay finite.
    optimizer = optax.sgd(1e-6, momentum=0.9)
    stage = hj.distillation_stage(*networks, method, optimizer)
    return Setting(stage, ours, (theirs, batch))


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"batch {record['batch']}, image {record['image']}, {record['rounds']} rounds "
        f"of {record['steps']} on {record['devices']} x {machine['device']} "
        f"({machine['processor']}), jax {machine['versions']['jax']}"
    )
    lines = [setting]
    for name, found in record["networks"].items():
        one, teach = (
            1e3 * found[part]["step_seconds"]["median"] for part in ("alone", "teach")
        )
        lines += [
            "",
            f"{name}: alone {one:.1f} ms, of which the teacher {teach:.1f} ms",
            f"{'':14}{'cost of a student':>18}{'95 %':>16}{'by FLOPs':>10}",
        ]
        for form, student in found["students"].items():
            cost, flops = student["cost"], student["flops"]
            interval = f"{cost['low']:.3f} - {cost['high']:.3f}"
            flops = "-" if flops is None else f"{flops:.3f}"
            lines.append(f"{form:14}{cost['median']:18.3f}{interval:>16}{flops:>10}")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--students", type=int, nargs="+", default=[1, 2, 4, 8], help="their numbers")
    add("--batch", type=int, default=16, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=20 if on_cpu else 30, help="rounds to measure")
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    options = parser.parse_args(arguments)
    if options.small:
        options.students, options.batch, options.size = [2], 4, 8
    return options


if __name__ == "__main__":
    # A cache would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
