"""CRD's kinds of negatives: step time and memory, against the gather formulation.

    python benchmarks/crd_negatives.py --out benchmarks/results/crd_negatives_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 5 there. Expected,
relative to the training step without CRD: shared negatives at most 1.15 (with 1.02 of
its FLOPs), gathering about 1.5. Temporary memory of the method alone: 1125 MB (gather),
128 (anchor), 42 (shared), 0.2 (in_batch).

Batch 64, 16384 negatives, 50000 training examples, embeddings of 128:

    gather      the published code: (64, 16385, 128) embeddings are gathered from each
                bank, multiplied, exponentiated, and compared by NCE. The candidates
                come with the batch, from the loader.
    anchor      hintjax.AnchorNegatives: the same draws, made on the device; if there
                are at most four times as many examples as negatives, all examples
                are scored and none is gathered
    shared      hintjax.SharedNegatives: one draw for the whole batch
    in_batch    hintjax.BatchNegatives: no bank
    none        no CRD: both embedding heads, each trained to predict the other's output

Two programs are measured for each kind: the method alone (loss, gradients and the
update of the banks; the features are arguments), and a training step of WRN-16-2 with
WRN-40-2 as the teacher and the method as a term. The step of "none" includes the
unavoidable parts, the teacher's forward pass and the heads. All programs are timed in
the same rounds. Temporary memory is the memory that the compiler plans for one step in
addition to arguments and results. The banks (51 MB) are donated arguments, so a copy of
them would appear in this number.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import hintjax as hj
from hintjax import memory as banks
from hintjax import methods, regressors

BAR = 1.15
CLASSES = 100
POOL = ("pool", "pool")
TEMPERATURE, MOMENTUM, EPSILON = 0.07, 0.5, 1e-7


Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # function, state, arguments


def none(pair: tuple[str, str], *, feature_dim: int = 128) -> hj.Method:
    """The unavoidable part: both heads, with a dense gradient and no negatives."""
    guided, hint = pair
    head = regressors.Embedding(feature_dim)

    def init(key, student, teacher, data):
        ours, theirs = jax.random.split(key)
        return {
            "student": regressors.init(head, ours, student.hints[guided].shape)[0],
            "teacher": regressors.init(head, theirs, teacher.hints[hint].shape)[0],
        }, {}

    def apply(params, memory, student, teacher, batch, context):
        s = head.apply({"params": params["student"]}, student.hints[guided])
        t = head.apply({"params": params["teacher"]}, teacher.hints[hint])
        return 1 - jnp.sum(s * t, -1), memory, {}

    return hj.Method(hj.Wants(hints=(guided,)), hj.Wants(hints=(hint,)), init, apply)


def gather(pair: tuple[str, str], *, feature_dim: int = 128) -> hj.Method:
    """CRD as published: every anchor's candidates are gathered from each bank.

    `batch["candidates"]` holds (batch, 1 + K) examples; the first is the anchor.
    """
    heads = none(pair, feature_dim=feature_dim)
    guided, hint = pair
    head = regressors.Embedding(feature_dim)

    def init(key, student, teacher, data):
        params, _ = heads.init(key, student, teacher, data)
        bank = banks.init(key, data.size, feature_dim)
        unset = jnp.full((), -1.0, jnp.float32)
        return params, {
            "student": {"bank": bank.student, "z": unset},
            "teacher": {"bank": bank.teacher, "z": unset},
        }

    def apply(params, memory, student, teacher, batch, context):
        candidates, index = batch["candidates"], batch["index"]
        own = {
            "student": head.apply({"params": params["student"]}, student.hints[guided]),
            "teacher": head.apply({"params": params["teacher"]}, teacher.hints[hint]),
        }
        total, after = 0.0, {}
        for side, other in (("student", "teacher"), ("teacher", "student")):
            rows = memory[other]["bank"][candidates]
            scores = jnp.exp(jnp.einsum("bkd,bd->bk", rows, own[side]) / TEMPERATURE)
            size, z = memory[side]["bank"].shape[0], memory[side]["z"]
            z = jnp.where(z < 0, jax.lax.stop_gradient(scores.mean() * size), z)
            values = nce(scores / z, size)
            total = total + values
            moved = MOMENTUM * memory[side]["bank"][index]
            moved = moved + (1 - MOMENTUM) * jax.lax.stop_gradient(own[side])
            moved = moved / jnp.sqrt(jnp.square(moved).sum(-1, keepdims=True))
            after[side] = {"bank": memory[side]["bank"].at[index].set(moved), "z": z}
        return total, after, {}

    return heads._replace(init=init, apply=apply)


def nce(p: jax.Array, size: int) -> jax.Array:
    """The published loss of scores exp(s . t / T) / Z; the positive is first."""
    noise = (p.shape[1] - 1) / size
    positive = jnp.log(p[:, 0] / (p[:, 0] + noise + EPSILON))
    negatives = jnp.log(noise / (p[:, 1:] + noise + EPSILON))
    return -(positive + negatives.sum(1))


def kinds(pair: tuple[str, str], number: int) -> dict[str, hj.Method]:
    """The methods that are compared, by name."""
    negatives = {
        "anchor": methods.AnchorNegatives(number),
        "shared": methods.SharedNegatives(number),
        "in_batch": methods.BatchNegatives(),
    }
    ours = {name: methods.crd(pair, negatives=one) for name, one in negatives.items()}
    return {"none": none(pair), "gather": gather(pair), **ours}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    programs, runs = {}, {}
    for name, make in _steps(options).items():
        function, state, rest = make()
        programs[name] = measure.compiled(function, state, *rest)
        runs[name] = measure.running(programs[name].call, state, rest)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    record = {
        "benchmark": "crd_negatives",
        "machine": machine,
        "teacher": options.teacher,
        "student": options.student,
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "negatives": options.negatives,
        "examples": options.examples,
        "rounds": options.rounds,
        "steps": options.steps,
        "programs": {
            name: program.record(seconds[name]) for name, program in programs.items()
        },
        "over_none": {
            kind: _over_none(kind, programs, seconds) for kind in options.kinds
        },
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _steps(options: argparse.Namespace) -> dict[str, Callable[[], Made]]:
    """Functions that make every program, by the program's name."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 6)
    n, draws = options.batch, np.random.default_rng(0)
    labels = np.arange(options.examples, dtype=np.int32) % CLASSES
    index = draws.permutation(options.examples)[:n].astype(np.int32)
    batch = {
        "image": jax.random.normal(keys[0], (n, options.size, options.size, 3)),
        "label": jnp.asarray(labels[index]),
        "index": jnp.asarray(index),
        "candidates": jnp.asarray(_candidates(draws, labels, index, options.negatives)),
    }
    data = hj.Data(labels)
    teacher, student = (
        hj.linen(measure.factory(name)(classes=CLASSES))
        for name in (options.teacher, options.student)
    )
    taught = teacher.init(keys[1], batch["image"])
    start = student.init(keys[2], batch["image"])
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(1e-6, momentum=0.9)
    )
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)

    def whole(method: hj.Method) -> Made:
        terms = {"task": task, "term": hj.weighted(method, 0.8)}
        stage = hj.distillation_stage(
            student, teacher, hj.objective(**terms), optimizer
        )
        state = stage.init(keys[3], start, taught, batch, data=data)
        return stage.update, state, (taught, batch)

    def alone(method: hj.Method) -> Made:
        shown = [
            network.apply(*variables, batch["image"], wants=wants, train=False)[0]
            for network, variables, wants in (
                (student, start, method.student),
                (teacher, taught, method.teacher),
            )
        ]
        shapes = jax.eval_shape(lambda: shown)
        make = jax.jit(lambda key, data: method.init(key, *shapes, data))
        params, memory = make(keys[4], data)

        @partial(jax.jit, donate_argnums=0)
        def step(state, params, student, teacher, batch):
            def loss(params, student, memory, key):
                context = hj.Context(key, jnp.int32(0), True)
                values, memory, _ = method.apply(
                    params, memory, student, teacher, batch, context
                )
                return values.mean(), memory

            memory, key = state
            now, key = jax.random.split(key)
            learning = jax.grad(loss, (0, 1), has_aux=True)
            grads, memory = learning(params, student, memory, now)
            return (memory, key), grads

        return step, (memory, keys[5]), (params, *shown, batch)

    made = kinds(POOL, options.negatives)
    return {
        f"{kind}, {name}": partial(program, made[kind])
        for kind in dict.fromkeys(["none", *options.kinds])
        for name, program in (("alone", alone), ("step", whole))
    }


def _candidates(
    draws: np.random.Generator, labels: np.ndarray, index: np.ndarray, number: int
) -> np.ndarray:
    """Each anchor, then negatives of other classes, without replacement if possible."""
    rows = []
    for one in index:
        others = np.flatnonzero(labels != labels[one])
        some = draws.choice(others, number, replace=number > len(others))
        rows.append(np.concatenate([[one], some]))
    return np.stack(rows).astype(np.int32)


def _over_none(
    kind: str,
    programs: Mapping[str, measure.Program],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The training step with CRD relative to the step without CRD."""
    time = measure.paired(seconds, f"{kind}, step", ["none, step"])
    counts = [programs[f"{one}, step"].flops for one in (kind, "none")]
    flops = None if None in counts else counts[0] / counts[1]
    bar = BAR if kind == "shared" else None
    rounds = len(seconds["none, step"])
    verdict = measure.verdict(bar, time, flops, rounds)
    return {"time": time, "flops": flops, "bar": bar, "verdict": verdict}


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine, programs = record["machine"], record["programs"]
    setting = (
        f"batch {record['batch']}, {record['negatives']} negatives of "
        f"{record['examples']} examples, {record['rounds']} rounds of "
        f"{record['steps']} on {machine['device']} ({machine['processor']}), jax "
        f"{machine['versions']['jax']}"
    )
    columns = (
        f"{'program':18}{'compile s':>10}{'temp MB':>9}{'GFLOP':>8}{'ms':>10}"
        f"{'95 %':>20}"
    )
    lines = [setting, "", columns]
    for name, one in programs.items():
        step = one["step_seconds"]
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(
            f"{name:18}{one['compile_seconds']:10.1f}"
            f"{_scaled(one['temp_bytes'], 1e6):>9}{_scaled(one['flops'], 1e9):>8}"
            f"{1e3 * step['median']:10.2f}"
            f"{f'{low:.2f} - {high:.2f}':>20}"
        )
    lines += ["", f"{'step / without CRD':18}{'ratio':>10}{'95 %':>16}{'FLOPs':>8}"]
    for kind, row in record["over_none"].items():
        time, flops = row["time"], _scaled(row["flops"], 1)
        interval = f"{time['low']:.3f} - {time['high']:.3f}"
        lines.append(
            f"{kind:18}{time['median']:10.3f}{interval:>16}{flops:>8}  {row['verdict']}"
        )
    return "\n".join(lines)


def _scaled(number: float | None, unit: float) -> str:
    return "-" if number is None else f"{number / unit:.2f}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    names = [name for name in kinds(POOL, 1) if name != "none"]
    add("--kinds", nargs="+", choices=names, default=names, help="kinds of negatives")
    add("--teacher", default="hintjax.models:wrn_40_2", help="package.module:factory")
    add("--student", default="hintjax.models:wrn_16_2", help="package.module:factory")
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    add("--negatives", type=int, default=16384, help="negatives of an anchor")
    add("--examples", type=int, default=50_000, help="examples in the memory bank")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=30, help="rounds to measure")
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    options = parser.parse_args(arguments)
    if options.small:
        options.teacher = options.student = "step_time:wrn_10_1"
        options.batch, options.size = 4, 8
        options.negatives, options.examples = 16, 512
    return options


if __name__ == "__main__":
    # A cache would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
