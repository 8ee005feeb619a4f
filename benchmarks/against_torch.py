"""Whole steps against a plain torch loop that does the same work.

    python3 -m venv .venv-torch && .venv-torch/bin/pip install torch numpy
    python benchmarks/against_torch.py --torch .venv-torch/bin/python --out FILE
    python benchmarks/against_torch.py --torch PYTHON --newest PYTHON --out FILE

Device: any; torch uses a GPU if it finds one. `--newest` names a Python with hintjax
and another version of jax, which is timed too. Leave the machine alone meanwhile.

WRN-40-2 teaches WRN-16-2, batch 64, images 32x32x3, 100 classes, SGD with momentum and
weight decay. CRD has 50,000 examples and 16,384 negatives for each anchor. The steps:

    kd            teacher forward, KD and the task
    hint_stage    both networks up to the middle, and the regressor
    crd           teacher forward, CRD and the task
    kd cached     `kd`, where the teacher's outputs are rows on the device; torch
                  computes them

torch runs each step with its default layout and with channels last, and its faster one
counts. HintJAX runs on one device, and on a CPU also on as many data-parallel devices
as there are cores. Each environment is a process, and one process works at a time. Each
round times all programs once, in a new order. A ratio divides the times of one round.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import step_time
import worker

import hintjax as hj
from hintjax import cache, methods

FOLDER = Path(__file__).parent
METHODS = ("kd", "hint_stage", "crd")
NETWORKS = {"teacher": (40, 2), "student": (16, 2)}
SMALL = {"teacher": (10, 1), "student": (10, 1)}
LIVE, CACHED = 1.0, 0.55  # the bars, relative to torch's faster layout


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    if options.worker:
        return _serve(options)
    workers = _workers(options)
    seconds: dict[str, list[float]] = {
        f"{who}: {name}": [] for who, one in workers.items() for name in one.programs
    }
    shuffle = np.random.default_rng(0)
    for _ in range(options.rounds):
        for title in shuffle.permutation(list(seconds)):
            who, _, name = title.partition(": ")
            seconds[title].append(workers[who].seconds(name, options.steps))
    for one in workers.values():
        one.close()
    record = {
        "benchmark": "against_torch",
        "machine": measure.machine(),
        "about": {who: one.about for who, one in workers.items()},
        "networks": SMALL if options.small else NETWORKS,
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "examples": options.examples,
        "negatives": options.negatives,
        "rounds": options.rounds,
        "steps": options.steps,
        "seconds": {name: measure.summary(found) for name, found in seconds.items()},
        "over_torch": ratios(seconds),
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """HintJAX's time divided by torch's, for each program of HintJAX.

    Torch's time in a round is that of the layout with the smaller median.
    """
    best = {}
    for title, found in seconds.items():
        if title.startswith("torch: "):
            name = title.removeprefix("torch: ").partition(",")[0]
            if name not in best or np.median(found) < np.median(best[name]):
                best[name] = found
    compared = {}
    for title, found in seconds.items():
        who, _, name = title.partition(": ")
        if who == "torch":
            continue
        method, _, cached = name.partition(" ")
        time = measure.summary(np.divide(found, best[method]))
        bar = CACHED if cached else LIVE
        verdict = measure.verdict(bar, time, None, len(found))
        compared[title] = {"time": time, "bar": bar, "verdict": verdict}
    return compared


def _workers(options: argparse.Namespace) -> dict[str, worker.Worker]:
    """The processes, by name."""
    networks = SMALL if options.small else NETWORKS
    asked = [
        *("--batch", options.batch, "--size", options.size),
        *("--examples", options.examples, "--negatives", options.negatives),
        *("--methods", *options.methods),
    ]
    sizes = [text for name, size in networks.items() for text in (f"--{name}", *size)]
    torch = [options.torch, FOLDER / "torch_step.py", *asked, *sizes]
    pythons = {"hintjax": sys.executable}
    if options.newest:
        pythons["hintjax, newest jax"] = options.newest
    devices = [1]
    if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1:
        devices.append(os.cpu_count() or 1)
    small = ["--small"] if options.small else []
    commands = {"torch": (torch, {"OMP_WAIT_POLICY": "passive"})}
    for name, python in pythons.items():
        for count in devices:
            mine = [python, __file__, "--worker", count, *small, *asked]
            title = f"{name} on {count} device{'s' * (count > 1)}"
            environment = (
                {"JAX_NUM_CPU_DEVICES": f"{count}"} if len(devices) > 1 else {}
            )
            commands[title] = (mine, environment)
    return {
        who: worker.Worker([str(word) for word in command], environment)
        for who, (command, environment) in commands.items()
    }


def _serve(options: argparse.Namespace) -> None:
    """Compiles HintJAX's programs in this process, and times them when asked."""
    runs = {}
    for name, (function, state, rest) in _steps(options).items():
        runs[name] = measure.running(function, state, rest)
        jax.block_until_ready(runs[name]())
        jax.block_until_ready(runs[name]())

    def timed(run: Callable[[], Any], steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            outputs = run()
        jax.block_until_ready(outputs)
        return (time.perf_counter() - start) / steps

    programs = {name: partial(timed, run) for name, run in runs.items()}
    worker.serve(programs, measure.machine() | {"devices": jax.device_count()})


def _steps(options: argparse.Namespace) -> dict[str, step_time.Made]:
    """The step of each method, and the step of KD with a cached teacher."""
    sizes = SMALL if options.small else NETWORKS
    teacher, student = (
        hj.linen(hj.models.WideResNet(*sizes[who], step_time.CLASSES))
        for who in ("teacher", "student")
    )
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    shape = (options.batch, options.size, options.size, 3)
    labels = np.arange(options.examples, dtype=np.int32) % step_time.CLASSES
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jnp.asarray(labels[: options.batch]),
        "index": jnp.arange(options.batch),
        "view": jnp.zeros(options.batch, jnp.int32),
    }
    taught, start = (
        teacher.init(keys[1], batch["image"]),
        student.init(keys[2], batch["image"]),
    )
    mesh = hj.data_mesh() if jax.device_count() > 1 else None
    decay = optax.add_decayed_weights(5e-4)
    how = {
        "optimizer": optax.chain(decay, optax.sgd(1e-6, momentum=0.9)),
        "mesh": mesh,
    }
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    terms = step_time.terms(negatives=options.negatives)
    negatives = methods.AnchorNegatives(options.negatives)
    crd = methods.crd(step_time.POOL, negatives=negatives, mesh=mesh)

    def joint(teacher, method, weight, part, **inputs):
        terms = {"task": hj.weighted(task, part), "term": hj.weighted(method, weight)}
        objective = hj.objective(**terms)
        return hj.distillation_stage(student, teacher, objective, **how, **inputs)

    def ready(stage, taught):
        data = hj.Data(labels)
        state = stage.init(keys[3], start, taught, batch, data=data)
        placed = (taught, batch)
        if mesh is not None:
            over = hj.sharding.over_batch(mesh)
            placed = (hj.sharding.place(taught, mesh), jax.device_put(batch, over))
        return stage.update, state, placed

    kd, hint = terms["kd"], terms["fitnets"]
    hints = hj.hint_stage(student, teacher, hj.objective(hint=hint.method), **how)
    live = {
        "kd": lambda: ready(joint(teacher, kd.method, kd.weight, kd.task), taught),
        "hint_stage": lambda: ready(hints, taught),
        "crd": lambda: ready(joint(teacher, crd, 0.8, 1.0), taught),
    }
    made = {name: live[name]() for name in options.methods}
    if "kd" in options.methods:
        plan = cache.contents(
            *(student, teacher, kd.method, start, taught, batch),
            coding="float32",
            examples=options.batch,
        )
        rows = jax.device_get(plan.encode(plan.features(taught, batch)))
        stage = joint(
            *(plan.network, plan.reading(kd.method), kd.weight, kd.task),
            teacher_inputs=plan.inputs,
        )
        made["kd cached"] = ready(stage, cache.variables_of(taught, cache.flat(rows)))
    return made


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"batch {record['batch']}, {record['rounds']} rounds of {record['steps']} on "
        f"{machine['device']} ({machine['processor']}), torch "
        f"{record['about']['torch']['torch']}"
    )
    lines = [setting, ""]
    for title, found in record["seconds"].items():
        lines.append(f"{title:48}{1e3 * found['median']:10.1f} ms")
    lines += ["", f"{'over the faster torch':48}{'ratio':>8}{'95 %':>16}"]
    for title, row in record["over_torch"].items():
        interval = "{low:.3f} - {high:.3f}".format(**row["time"])
        median = row["time"]["median"]
        lines.append(f"{title:48}{median:8.3f}{interval:>16}  {row['verdict']}")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch", help="a Python with torch and numpy")
    add("--newest", help="a Python with hintjax and another version of jax")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="their names")
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--negatives", type=int, default=16384, help="negatives of each anchor")
    add("--examples", type=int, default=50_000, help="examples in CRD's memory bank")
    add("--rounds", type=int, default=14, help="rounds to measure")
    on_cpu = jax.default_backend() == "cpu"
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    add("--small", action="store_true", help="time tiny networks, as a test")
    add("--out", type=Path, help="JSON file to write the results to")
    add("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.torch and not options.worker:
        parser.error("expected --torch, the path of a Python with torch and numpy")
    return options


if __name__ == "__main__":
    main()
