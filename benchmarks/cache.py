"""Step time with a cache of the teacher's features, against a step without a teacher.

    python benchmarks/cache.py --out benchmarks/results/cache_cpu.json

Device: any; the committed numbers are from two otherwise idle CPU cores (6 rounds, 6
minutes). Expected: no cached step above 1.10 times the student's step. With rows of
float32 the intervals of all methods are below; with rows of bfloat16 one reaches 1.15
(FSP).

WRN-40-2 teaches WRN-16-2, batch 64, images 32x32x3, 100 classes; CRD shares 16384
negatives of 50000 examples. For each method four programs are timed in the same rounds:

    live        the teacher computes its features in the step, as without a cache
    float32     the step reads them from a cache of float32 rows on the device
    bfloat16    the same, with rows of bfloat16
    student     the student alone: the same loss, with features that are arguments

A step trains with the task and one method; `hint_stage` is the hint stage of FitNets.
Features of the student's step have the reduced form that the method allows, such as
attention maps. The ratios divide by the student's step. The rows on the device are
those of `--rows` images, from which a step gathers its batch; an image's bytes do not
depend on their number. All rows repeat those of one batch.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import step_time

import hintjax as hj
from hintjax import cache

BAR = 1.10
METHODS = ("kd", "fitnets", "hint_stage", "attention_transfer", "fsp", "crd", "review")
CODED = ("float32", "bfloat16")

Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # function, state, arguments


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    record = {
        "benchmark": "cache",
        "machine": machine,
        "teacher": options.teacher,
        "student": options.student,
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "negatives": options.negatives,
        "examples": options.examples,
        "rows": options.rows,
        "rounds": options.rounds,
        "steps": options.steps,
        "methods": _measured(options),
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the four steps of every method."""
    prepared = _prepared(options)
    found = {}
    for name in options.methods:
        steps, nbytes = prepared(name)
        programs, runs = {}, {}
        for kind, (function, state, rest) in steps.items():
            programs[kind] = measure.compiled(function, state, *rest)
            runs[kind] = measure.running(programs[kind].call, state, rest)
        seconds = measure.interleave(runs, options.rounds, options.steps)
        found[name] = {
            "bytes_per_image": nbytes,
            "programs": {
                kind: program.record(seconds[kind])
                for kind, program in programs.items()
            },
            "over_student": {
                kind: _over_student(kind, programs, seconds)
                for kind in ("live", *CODED)
            },
        }
    return found


def _prepared(
    options: argparse.Namespace,
) -> Callable[[str], tuple[dict[str, Made], dict[str, int]]]:
    """Makes the function that makes a method's four steps, and its bytes by coding."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    n, draws = options.batch, np.random.default_rng(0)
    labels = np.arange(options.examples, dtype=np.int32) % step_time.CLASSES
    index = draws.permutation(options.rows)[:n].astype(np.int32)
    batch = {
        "image": jax.random.normal(keys[0], (n, options.size, options.size, 3)),
        "label": jnp.asarray(labels[index]),
        "index": jnp.asarray(index),
        "view": jnp.zeros(n, jnp.int32),
    }
    teacher, student = (
        hj.linen(measure.factory(name)(classes=step_time.CLASSES))
        for name in (options.teacher, options.student)
    )
    taught = teacher.init(keys[1], batch["image"])
    start = student.init(keys[2], batch["image"])
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(1e-6, momentum=0.9)
    )
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    terms = step_time.terms(negatives=options.negatives)

    def stage(name, teacher, inputs, reading=lambda method: method):
        term = terms["fitnets" if name == "hint_stage" else name]
        method = hj.weighted(reading(term.method), term.weight)
        how = {"optimizer": optimizer, "teacher_inputs": inputs}
        if name == "hint_stage":
            return hj.hint_stage(student, teacher, hj.objective(term=method), **how)
        objective = hj.objective(task=hj.weighted(task, term.task), term=method)
        return hj.distillation_stage(student, teacher, objective, **how)

    def cached(name, plan):
        made = stage(name, plan.network, plan.inputs, plan.reading)
        return made, cache.variables_of(taught, _rows(plan, taught, batch, options))

    def updating(made, state, variables):
        return made.update, jax.tree.map(jnp.array, state), (variables, batch)

    def alone(made, state, variables):
        given = jax.jit(made.teach)(state, variables, batch)
        state = jax.tree.map(jnp.array, state)
        return jax.jit(made.step, donate_argnums=0), state, (given, batch)

    def steps(name):
        method = terms["fitnets" if name == "hint_stage" else name].method
        plans = {
            coding: cache.contents(
                *(student, teacher, method, start, taught, batch),
                coding=coding,
                examples=options.rows,
            )
            for coding in cache.CODINGS
        }
        made = stage(name, teacher, hj.stages.image)
        data = hj.Data(labels)
        state = made.init(keys[3], start, taught, batch, data=data)
        kinds = {"live": updating(made, state, taught)}
        for coding in CODED:
            made, variables = cached(name, plans[coding])
            kinds[coding] = updating(made, state, variables)
            if coding == "float32":
                kinds["student"] = alone(made, state, variables)
        return kinds, {coding: plan.nbytes for coding, plan in plans.items()}

    return steps


def _rows(
    plan: cache.Contents, taught: hj.Variables, batch: Mapping[str, Any], options: Any
) -> dict[str, jax.Array]:
    """Rows on the device, which repeat those of a batch."""
    encode = jax.jit(lambda *given: plan.encode(plan.features(*given)))
    found = jax.device_get(encode(taught, batch))
    repeated = np.arange(options.rows) % len(batch["image"])
    return jax.device_put(cache.flat({name: x[repeated] for name, x in found.items()}))


def _over_student(
    kind: str,
    programs: Mapping[str, measure.Program],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """A step relative to the student's step."""
    time = measure.paired(seconds, kind, ["student"])
    counts = [programs[one].flops for one in (kind, "student")]
    flops = None if None in counts else counts[0] / counts[1]
    bar = BAR if kind in CODED else None
    verdict = measure.verdict(bar, time, flops, len(seconds["student"]))
    return {"time": time, "flops": flops, "bar": bar, "verdict": verdict}


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"batch {record['batch']}, {record['rounds']} rounds of {record['steps']} on "
        f"{machine['device']} ({machine['processor']}), jax "
        f"{machine['versions']['jax']}"
    )
    lines = [
        setting,
        "",
        f"{'step / student alone':32}{'ms':>9}{'ratio':>8}{'95 %':>16}{'FLOPs':>8}",
    ]
    for name, one in record["methods"].items():
        for kind, row in one["over_student"].items():
            time, flops = row["time"], row["flops"]
            step = 1e3 * one["programs"][kind]["step_seconds"]["median"]
            interval = f"{time['low']:.3f} - {time['high']:.3f}"
            shown = "-" if flops is None else f"{flops:.3f}"
            lines.append(
                f"{f'{name}, {kind}':32}{step:9.1f}{time['median']:8.3f}{interval:>16}"
                f"{shown:>8}  {row['verdict']}"
            )
    columns = "".join(f"{coding:>12}" for coding in cache.CODINGS)
    lines += ["", f"{'bytes per image and view':32}{columns}"]
    for name, one in record["methods"].items():
        sizes = "".join(f"{size:12}" for size in one["bytes_per_image"].values())
        lines.append(f"{name:32}{sizes}")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="their names")
    add("--teacher", default="hintjax.models:wrn_40_2", help="package.module:factory")
    add("--student", default="hintjax.models:wrn_16_2", help="package.module:factory")
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--rows", type=int, default=2048, help="images whose rows are on the device")
    add("--negatives", type=int, default=16384, help="negatives that CRD draws")
    add("--examples", type=int, default=50_000, help="examples in CRD's memory bank")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=14, help="rounds to measure")
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    options = parser.parse_args(arguments)
    if options.small:
        options.teacher = options.student = "step_time:wrn_10_1"
        options.batch, options.size, options.rows = 4, 8, 8
        options.negatives, options.examples = 16, 512
    return options


if __name__ == "__main__":
    # A cache of programs would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
