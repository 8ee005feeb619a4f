"""Step time of every method against the sum of its unavoidable parts.

    python benchmarks/step_time.py --out benchmarks/results/step_time_cpu.json
    python benchmarks/step_time.py --plot benchmarks/results/step_time_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 9 there, fewer on an
accelerator. Expected: every ratio with a bar at most 1.05 (FLOPs 1.000 to 1.001); the
hint stage at 0.82 of the joint step: the student is spared the last third of its work,
and the teacher stops at group2 in both.

WRN-40-2 teaches WRN-16-2, batch 64, images 32x32x3, 100 classes. The parts of a step
are programs of their own, timed in the same rounds:

    kd, attention_transfer   teacher forward + the task alone
    fitnets (joint)          teacher forward + the task with the regressor
    hint_stage               teacher forward + a student cut at the guided layer
                             with the regressor
    task                     the same step written out in plain Flax and optax

The teacher's forward pass stops where the method's last want of it is. "With the
regressor" is a step that runs the regressor forward and backward and trains it, on
half the mean square of its output: the cheapest loss with a dense gradient, which
needs no teacher. (A constant gradient would let XLA turn the 1x1 convolution's
backward pass into a sum.) Further rows compare the hint stage with the joint step,
and with a hint stage of two networks that end at the hint (WRN only).

Where the interval of a ratio contains the bar, or there are fewer than 6 rounds, the
clock cannot tell; then the ratio of the compiled programs' floating-point operations
decides. Backends that do not count them leave "undecided".
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import optax

import hintjax as hj
from hintjax.models import WideResNet
from hintjax.models.blocks import conv
from hintjax.models.wrn import Group

BAR = 1.05
METHODS = ("task", "kd", "attention_transfer", "fitnets", "hint_stage")
CLASSES = 100


class Row(NamedTuple):
    """A comparison: one program over the sum of others."""

    whole: str
    parts: tuple[str, ...]
    bar: float | None = BAR


ROWS = {
    "task": Row("task", ("plain",)),
    "kd": Row("kd", ("teach_logits", "task")),
    "attention_transfer": Row("attention_transfer", ("teach_maps", "task")),
    "fitnets": Row("fitnets", ("teach_hint", "task_regressor")),
    "hint_stage": Row("hint_stage", ("teach_hint", "cut_regressor")),
    "hint_stage / cut networks": Row("hint_stage", ("hint_stage_cut",)),
    "hint_stage / fitnets": Row("hint_stage", ("fitnets",), bar=None),
}


class Cut(nn.Module):
    """A WRN that ends with one of its groups."""

    whole: WideResNet
    groups: int

    @nn.compact
    def __call__(self, x, train=False):
        x = conv(16, name="stem")(x)
        for number in range(1, self.groups + 1):
            features = 8 * 2**number * self.whole.widen
            stride = 1 if number == 1 else 2
            group = Group(features, self.whole.blocks, stride, name=f"group{number}")
            x = group(x, train)
        return x


def wrn_10_1(classes: int) -> WideResNet:
    """The network of `--small`."""
    return WideResNet(10, 1, classes)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns what `--out` holds."""
    options = _options(arguments)
    if options.plot:
        record = json.loads(options.plot.read_text())
        plot(record, options.plot.with_suffix(".png"))
        return record
    machine = measure.machine()
    steps = _steps(options)
    rows = {
        name: row
        for name, row in ROWS.items()
        if row.whole in options.methods and {row.whole, *row.parts} <= {*steps}
    }
    needed = {name for row in rows.values() for name in (row.whole, *row.parts)}
    programs, runs = {}, {}
    for name in sorted(needed):
        function, state, rest = steps[name]()
        programs[name] = measure.compiled(function, state, *rest)
        runs[name] = _running(programs[name].call, state, rest)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    record = {
        "benchmark": "step_time",
        "machine": machine,
        "teacher": options.teacher,
        "student": options.student,
        "pairs": options.pairs,
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "classes": CLASSES,
        "rounds": options.rounds,
        "steps": options.steps,
        "programs": {
            name: program.record(seconds[name]) for name, program in programs.items()
        },
        "ratios": {name: _ratio(row, programs, seconds) for name, row in rows.items()},
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _steps(options):
    """How to make every program: name -> () -> (function, state, other arguments).

    A function is jitted, `(state, *others) -> (state, anything)`.
    """
    # Drawing weights with the default generator takes 20 seconds to compile on CPU.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    shape = (options.batch, options.size, options.size, 3)
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jax.random.randint(keys[1], shape[:1], 0, CLASSES),
    }
    modules = [
        _factory(name)(classes=CLASSES) for name in (options.teacher, options.student)
    ]
    teacher, student = map(hj.linen, modules)
    taught = teacher.init(keys[2], batch["image"])
    start = student.init(keys[3], batch["image"])
    pairs = [tuple(pair.split("->")) for pair in options.pairs]
    guided, hint = pairs[len(pairs) // 2]
    # A rate so small that hundreds of steps on random data stay finite.
    decay = optax.add_decayed_weights(5e-4)
    optimizer = optax.chain(decay, optax.sgd(1e-6, momentum=0.9))

    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    maps = hj.attention_transfer(pairs)
    regressor = partial(hj.regressors.conv, batch_norm=True, activation=nn.relu)
    hints = hj.fitnets([(guided, hint)], regressor=regressor)
    target = teacher.layers(*taught, batch["image"])[hint].shape
    regression = regressor_alone(guided, target, regressor)

    def trained(make, student, teacher, weights=(start, taught), **terms):
        def step():
            stage = make(student, teacher, hj.objective(**terms), optimizer)
            ours, theirs = weights
            theirs = None if teacher is None else theirs
            state = stage.init(keys[4], ours, theirs, batch)
            return stage.update, state, (theirs, batch)

        return step

    def teach(method):
        def step():
            stage = hj.distillation_stage(student, teacher, method, optimizer)

            @jax.jit
            def forward(state, variables, batch):
                return state, stage.teach(None, variables, batch)

            return forward, (), (taught, batch)

        return step

    joint = partial(trained, hj.distillation_stage, student)
    steps = {
        "plain": lambda: plain(modules[1], optimizer, start, batch),
        "teach_logits": teach(hj.kd()),
        "teach_maps": teach(maps),
        "teach_hint": teach(hints),
        "task": joint(None, task=task),
        "task_regressor": joint(None, task=task, hint=hj.weighted(regression, 100.0)),
        "kd": joint(teacher, task=hj.weighted(task, 0.1), kd=hj.weighted(hj.kd(), 0.9)),
        "attention_transfer": joint(
            teacher, task=task, attention=hj.weighted(maps, 1000.0)
        ),
        "fitnets": joint(teacher, task=task, hint=hj.weighted(hints, 100.0)),
        "hint_stage": trained(hj.hint_stage, student, teacher, hint=hints),
    }
    if all(isinstance(module, WideResNet) for module in modules):
        ends = _cut(modules[0], hint, taught), _cut(modules[1], guided, start)
        (short_teacher, short_taught), (short, short_start) = ends
        weights = short_start, short_taught
        steps["hint_stage_cut"] = trained(
            hj.hint_stage, short, short_teacher, weights, hint=hints
        )
        steps["cut_regressor"] = trained(
            hj.distillation_stage, short, None, weights, hint=regression
        )
    return steps


def regressor_alone(guided: str, target: tuple[int, ...], sizing) -> hj.Method:
    """The regressor of one pair, trained towards 0: FitNets without a teacher."""

    def sized(student):
        return sizing(student.hints[guided].shape[1:], target[1:])

    def init(key, student, teacher, data):
        return hj.regressors.init(sized(student), key, student.hints[guided].shape)

    def apply(params, memory, student, teacher, batch, context):
        predicted, memory = hj.regressors.apply(
            sized(student), params, memory, student.hints[guided], context.train
        )
        axes = tuple(range(1, predicted.ndim))
        return jnp.mean(jnp.square(predicted), axes) / 2, memory, {}

    return hj.Method(hj.Wants(hints=(guided,)), hj.Wants(), init, apply)


def plain(module: nn.Module, optimizer, variables: hj.Variables, batch):
    """One step of the task in Flax and optax, without hintjax."""

    def loss(params, stats, image, label):
        logits, changed = module.apply(
            {"params": params, **stats}, image, train=True, mutable=list(stats)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return losses.mean(), changed

    @partial(jax.jit, donate_argnums=0)
    def update(state, image, label):
        params, stats, opt_state = state
        learning = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = learning(params, stats, image, label)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    params, stats = jax.tree.map(jnp.copy, tuple(variables))
    state = (params, stats, optimizer.init(params))
    return update, state, (batch["image"], batch["label"])


def table(record: Mapping[str, Any]) -> str:
    """The record as text: the programs, then the ratios."""
    machine, programs = record["machine"], record["programs"]
    setting = (
        f"{record['teacher']} -> {record['student']}, batch {record['batch']}, "
        f"{record['rounds']} rounds of {record['steps']} on {machine['device']} "
        f"({machine['processor']}), jax {machine['versions']['jax']}"
    )
    heading = f"{'program':20}{'trace s':>8}{'compile s':>11}{'step ms':>10}{'95 %':>18}{'GFLOP':>9}"
    lines = [setting, "", heading]
    for name, program in programs.items():
        step, flops = program["step_seconds"], program["flops"]
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(
            f"{name:20}{program['trace_seconds']:8.1f}{program['compile_seconds']:11.1f}"
            f"{1e3 * step['median']:10.2f}"
            f"{f'{low:.2f} - {high:.2f}':>18}"
            + (f"{'-':>9}" if flops is None else f"{flops / 1e9:9.2f}")
        )
    lines += ["", f"{'over its parts':40}{'ratio':>7}{'95 %':>16}{'FLOPs':>8}  verdict"]
    for name, row in record["ratios"].items():
        time, flops = row["time"], row["flops"]
        title = name if "/" in name else f"{name} / {' + '.join(row['parts'])}"
        interval = f"{time['low']:.3f} - {time['high']:.3f}"
        lines.append(
            f"{title:40}{time['median']:7.3f}{interval:>16}"
            + (f"{'-':>8}" if flops is None else f"{flops:8.4f}")
            + f"  {row['verdict']}"
        )
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """The ratios with their intervals, and the bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(record["ratios"].items()):
        time = row["time"]
        axes.plot([time["low"], time["high"]], [place, place], color="C0", lw=3)
        (median,) = axes.plot(time["median"], place, "o", color="C0")
        if row["flops"] is not None:
            (flops,) = axes.plot(row["flops"], place, "|", color="C1", ms=14, mew=2)
            flops.set_label("FLOPs" if place == 0 else None)
    median.set_label("time: median, 95 % interval")
    axes.axvline(BAR, color="0.6", ls="--", label=f"bar {BAR}")
    axes.axvline(1, color="0.85", zorder=0)
    names = [name.replace("_", " ") for name in record["ratios"]]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    machine = record["machine"]
    axes.set_xlabel("step / sum of its unavoidable parts")
    axes.set_title(
        f"{record['teacher'].split(':')[-1]} -> {record['student'].split(':')[-1]}, "
        f"batch {record['batch']}, {machine['device']}, {machine['cores']} cores, "
        f"jax {machine['versions']['jax']}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _running(call, state, rest):
    """One step at each call; the state goes around, since it is donated."""

    def run():
        nonlocal state
        state, shown = call(state, *rest)
        return state, shown

    return run


def _ratio(row, programs, seconds):
    time = measure.paired(seconds, row.whole, row.parts)
    counts = [programs[name].flops for name in (row.whole, *row.parts)]
    flops = None if None in counts else counts[0] / sum(counts[1:])
    return {
        "whole": row.whole,
        "parts": row.parts,
        "time": time,
        "flops": flops,
        "bar": row.bar,
        "verdict": _verdict(row.bar, time, flops, len(seconds[row.whole])),
    }


def _verdict(bar, time, flops, rounds):
    """What the interval says of the bar; where it cannot tell, what FLOPs say."""
    if bar is None:
        return ""
    if rounds >= measure.FEWEST_ROUNDS and not time["low"] <= bar < time["high"]:
        return "within" if time["high"] <= bar else "above"
    if flops is None:
        return "undecided"
    return "within by FLOPs" if flops <= bar else "above by FLOPs"


def _factory(name):
    """What `package.module:factory` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _cut(module, path, variables):
    """The network that ends at groupN, with the weights it has up to there."""
    last = int(path.removeprefix("group"))
    kept = {"stem", *(f"group{number}" for number in range(1, last + 1))}
    params, stats = (
        {name: tree[name] for name in tree if name in kept}
        for tree in (variables.params, variables.state["batch_stats"])
    )
    return hj.linen(Cut(module, last)), hj.Variables(params, {"batch_stats": stats})


def _options(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", default="hintjax.models:wrn_40_2", help="package.module:factory")
    add("--student", default="hintjax.models:wrn_16_2", help="package.module:factory")
    groups = [f"group{number}->group{number}" for number in (1, 2, 3)]
    add("--pairs", nargs="+", default=groups, help="guided->hint; the middle one too")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--batch", type=int, default=64)
    add("--size", type=int, default=32, help="height and width of the images")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=30)
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    add("--small", action="store_true", help="a tiny case: does it run at all")
    add("--out", type=Path, help="write the results here, as JSON")
    add("--plot", type=Path, help="draw the results in this file; measure nothing")
    options = parser.parse_args(arguments)
    if options.small:
        options.teacher = options.student = f"{__name__}:wrn_10_1"
        options.batch, options.size = 4, 8
    return options


if __name__ == "__main__":
    # Compile times are among the results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
