"""Step time of every method, relative to the sum of its unavoidable parts.

    python benchmarks/step_time.py --out benchmarks/results/step_time_cpu.json
    python benchmarks/step_time.py --methods all --rounds 12 --out FILE
    python benchmarks/step_time.py --plot benchmarks/results/step_time_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 13 there for the
core methods, 17 for all methods with 12 rounds; fewer on an accelerator. Expected: no
ratio above its bar (1.05; 1.15 for FSP, CRD with shared negatives and ReviewKD). The
hint stage takes 0.82 of the joint step, because the student does not compute its last
third; the teacher stops at group2 in both.

WRN-40-2 teaches WRN-16-2, batch 64, images 32x32x3, 100 classes; CRD draws 16384
negatives of 50000 examples. A step trains with one method and the task. The parts of a
step are separate programs, timed in the same rounds:

    a method     teacher forward + a step of the task and the method's regressors
    hint_stage   teacher forward + a student cut at the guided layer, and the regressor
    task         the same step in plain Flax and optax

The teacher's forward pass stops at the last layer that the method needs. The step with
regressors (ABF, embedding heads, ...) runs them forward and backward and trains them on
half the mean square of their output: the cheapest loss with a dense gradient that needs
no teacher. (With a constant gradient, XLA would replace the backward pass of a 1x1
convolution by a sum.) The parts do not include FT's frozen encoder, nor the classifiers
that CAT-KD and SimKD apply a second time; these methods have no bar. More rows compare
the hint stage with the joint step, and with a hint stage of two networks that end at
the hint (WRN only).

If the interval of a ratio contains the bar, or if there are fewer than 6 rounds, times
cannot decide; then the ratio of the compiled programs' floating-point operations
decides. If the backend does not count operations, the verdict is "undecided".
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import optax

import hintjax as hj
from hintjax import methods, regressors
from hintjax.methods.boundary import CONNECTOR as BOUNDARY
from hintjax.methods.overhaul import CONNECTOR as OVERHAUL
from hintjax.methods.variational import MEAN
from hintjax.models import WideResNet
from hintjax.models.blocks import conv
from hintjax.models.wrn import Group

CLASSES = 100
GROUPS = [(name, name) for name in ("group1", "group2", "group3")]
# Names of WRN's layers; for other networks, choose methods that do not need them.
STEM, POOL, MAP = [(name, name) for name in ("stem", "pool", "pool:in")]
BEFORE_RELU = ("group2/block1/norm1", "group3/block1/norm1", "norm")
NORMS = [(name, name) for name in BEFORE_RELU]

BAR, LOOSER_BAR = 1.05, 1.15
CORE = ("task", "kd", "attention_transfer", "fitnets", "hint_stage")
CORE += ("fsp", "crd", "review")
# Methods without a row, with the reason.
TOKENS = "it compares hidden states of transformers, which these networks do not have"
TASK = "these networks classify, and it is the form of KD of another task"
UNLABELED = "it is for teachers that were trained without labels"
LEFT_OUT = {
    "binary_kd": TASK,
    "dense_kd": TASK,
    "regression_kd": TASK,
    "cosine": TOKENS,
    "dense_matching": UNLABELED,
    "minilm": TOKENS,
    "paraphrase": "it is an earlier stage that trains an autoencoder on the teacher",
    "patient": TOKENS,
    "token_gram": TOKENS,
    "orthogonal_projection": UNLABELED,
    "queue_similarity": UNLABELED,
    "tinybert": TOKENS,
}

Hints = Mapping[str, jax.ShapeDtypeStruct]
Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # function, state, arguments
HINT = partial(regressors.conv, batch_norm=True, activation=nn.relu)


class Term(NamedTuple):
    """A method that stands beside the task, with its weights, regressors and bar."""

    method: hj.Method
    weight: float
    trains: str | None = None  # its regressors, as a key of `trained`
    bar: float | None = None
    task: float = 1.0  # the task's weight


class Row(NamedTuple):
    """A comparison: one program relative to the sum of others."""

    whole: str
    parts: tuple[str, ...]
    bar: float | None = BAR


def terms(pairs: hj.method.Pairs = GROUPS, negatives: int = 16384) -> dict[str, Term]:
    """Every method with its usual layers and weight; variants have a colon."""
    middle, last = [pairs[len(pairs) // 2]], [pairs[-1]]
    crd = {
        "crd": methods.SharedNegatives(negatives),
        "crd:anchor": methods.AnchorNegatives(negatives),
        "crd:in_batch": methods.BatchNegatives(),
    }
    made = {
        "kd": Term(methods.kd(), 0.9, bar=BAR, task=0.1),
        "attention_transfer": Term(methods.attention_transfer(pairs), 1000, bar=BAR),
        "fitnets": Term(methods.fitnets(middle, regressor=HINT), 100, "hint", BAR),
        "fsp": Term(methods.fsp(methods.flows([STEM, *pairs])), 50, bar=LOOSER_BAR),
        "review": Term(methods.review([*pairs, POOL]), 5, "fusion", LOOSER_BAR),
        **{
            name: Term(methods.crd(POOL, negatives=kind), 0.8, "heads")
            for name, kind in crd.items()
        },
        "activation_boundary": Term(methods.activation_boundary(NORMS), 1, "boundary"),
        "channel_wise": Term(methods.channel_wise(last), 5),
        "class_attention": Term(methods.class_attention(MAP), 400),
        "correlation_congruence": Term(
            methods.correlation_congruence([POOL]), 0.02, "heads"
        ),
        "decoupled_kd": Term(methods.decoupled_kd(), 1),
        "dist": Term(methods.dist(), 1),
        "factor_transfer": Term(methods.factor_transfer(last), 200, "translator"),
        "masked_generation": Term(methods.masked_generation(last), 7e-5, "generator"),
        "overhaul": Term(methods.overhaul(NORMS), 1e-3, "connector"),
        "probability_transfer": Term(methods.probability_transfer([POOL]), 30_000),
        "relational": Term(methods.relational([POOL]), 1),
        "selectivity": Term(methods.selectivity(pairs), 50),
        "similarity_preserving": Term(methods.similarity_preserving(last), 3000),
        "simkd": Term(methods.simkd(MAP), 1, "projector"),
        "hard_labels": Term(methods.hard_labels(), 0.5, task=0.5),
        "soft_targets": Term(methods.soft_targets(), 4),
        "standardized_kd": Term(methods.standardized_kd(), 9),
        "variational": Term(methods.variational(pairs), 1, "means"),
    }
    made["crd"] = made["crd"]._replace(bar=LOOSER_BAR)
    # An earlier stage changes weights, but not the cost of a step.
    return {
        name: term._replace(method=term.method._replace(prepare=None))
        for name, term in made.items()
    }


def trained(
    pairs: hj.method.Pairs = GROUPS,
) -> dict[str, Callable[[Hints], hj.Method]]:
    """Methods that only train regressors, made from the shapes of the hints."""

    def heads(
        student: regressors.Shape, teacher: regressors.Shape
    ) -> regressors.Regressor:
        # Both networks have the same number of pooled features: two heads as one.
        return regressors.linear(student, (2 * 128,))

    def generator(
        student: regressors.Shape, teacher: regressors.Shape
    ) -> regressors.Generator:
        return regressors.Generator(teacher[-1])

    middle, last = [pairs[len(pairs) // 2]], [pairs[-1]]
    fusion = methods.review([*pairs, POOL], loss=lambda ours, theirs: _small(ours))
    factor = methods.factor_transfer(last, loss=lambda ours, theirs: _small(ours))
    return {
        "hint": partial(regressors_alone, middle, HINT),
        "fusion": partial(without_teacher, fusion),
        "heads": partial(regressors_alone, [POOL], heads),
        "boundary": partial(regressors_alone, NORMS, BOUNDARY),
        "translator": partial(without_teacher, factor),
        "generator": partial(regressors_alone, last, generator),
        "connector": partial(regressors_alone, NORMS, OVERHAUL),
        "projector": partial(regressors_alone, [MAP], regressors.bottleneck),
        "means": partial(regressors_alone, pairs, MEAN),
    }


def rows(terms: Mapping[str, Term]) -> dict[str, Row]:
    """All comparisons, by name."""
    made = {"task": Row("task", ("plain",))}
    for name, term in terms.items():
        task = f"task_{term.trains}" if term.trains else "task"
        made[name] = Row(name, (_teach(term.method), task), term.bar)
    teach = _teach(terms["fitnets"].method)
    return made | {
        "hint_stage": Row("hint_stage", (teach, "cut_hint")),
        "hint_stage / cut networks": Row("hint_stage", ("hint_stage_cut",)),
        "hint_stage / fitnets": Row("hint_stage", ("fitnets",), bar=None),
    }


class Cut(nn.Module):
    """A WRN that ends with one of its groups."""

    whole: WideResNet
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The feature maps of the last group."""
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
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    if options.plot:
        record = json.loads(options.plot.read_text())
        plot(record, options.plot.with_suffix(".png"))
        return record
    machine = measure.machine()
    steps = _steps(options)
    compared = {
        name: row
        for name, row in rows(terms(options.pairs)).items()
        if row.whole in options.methods and {row.whole, *row.parts} <= {*steps}
    }
    needed = {name for row in compared.values() for name in (row.whole, *row.parts)}
    programs, runs = {}, {}
    for name in sorted(needed):
        function, state, rest = steps[name]()
        programs[name] = measure.compiled(function, state, *rest)
        runs[name] = measure.running(programs[name].call, state, rest)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    record = {
        "benchmark": "step_time",
        "machine": machine,
        "teacher": options.teacher,
        "student": options.student,
        "pairs": ["->".join(pair) for pair in options.pairs],
        "batch": options.batch,
        "image": [options.size, options.size, 3],
        "classes": CLASSES,
        "examples": options.examples,
        "negatives": options.negatives,
        "rounds": options.rounds,
        "steps": options.steps,
        "programs": {
            name: program.record(seconds[name]) for name, program in programs.items()
        },
        "ratios": {
            name: _ratio(row, programs, seconds) for name, row in compared.items()
        },
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _steps(options: argparse.Namespace) -> dict[str, Callable[[], Made]]:
    """Functions that make every program, by the program's name.

    A program's function is jitted, `(state, *others) -> (state, anything)`.
    """
    # The default generator of random weights takes 20 seconds to compile on CPU.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 5)
    shape = (options.batch, options.size, options.size, 3)
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jax.random.randint(keys[1], shape[:1], 0, CLASSES),
        "index": jnp.arange(options.batch),
    }
    labels = jnp.arange(options.examples) % CLASSES
    data = hj.Data(labels.at[: options.batch].set(batch["label"]))
    modules = [
        measure.factory(name)(classes=CLASSES)
        for name in (options.teacher, options.student)
    ]
    teacher, student = map(hj.linen, modules)
    taught = teacher.init(keys[2], batch["image"])
    start = student.init(keys[3], batch["image"])
    # With so small a rate, hundreds of steps on random data stay finite.
    decay = optax.add_decayed_weights(5e-4)
    optimizer = optax.chain(decay, optax.sgd(1e-6, momentum=0.9))
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)

    def step(make, student, teacher, weights=(start, taught), **terms):
        def made():
            stage = make(student, teacher, hj.objective(**terms), optimizer)
            ours, theirs = weights
            theirs = None if teacher is None else theirs
            state = stage.init(keys[4], ours, theirs, batch, data=data)
            return stage.update, state, (theirs, batch)

        return made

    def teach(method):
        def made():
            @jax.jit
            def forward(state, variables, batch):
                image, wants = batch["image"], _last(method)
                return state, teacher.apply(*variables, image, wants=wants, train=False)

            return forward, (), (taught, batch)

        return made

    joint = partial(step, hj.distillation_stage, student)
    all_terms = terms(options.pairs, options.negatives)
    wants = hj.method.union(*(term.method.teacher for term in all_terms.values()))
    shapes = jax.eval_shape(
        lambda: teacher.apply(*taught, batch["image"], wants=wants, train=False)[0]
    ).hints
    alone = {name: make(shapes) for name, make in trained(options.pairs).items()}
    hints = all_terms["fitnets"].method
    steps = {
        "plain": lambda: plain(modules[1], optimizer, start, batch),
        "task": joint(None, task=task),
        **{
            f"task_{name}": joint(None, task=task, trained=method)
            for name, method in alone.items()
        },
        **{_teach(term.method): teach(term.method) for term in all_terms.values()},
        **{
            name: joint(
                teacher,
                task=hj.weighted(task, term.task),
                term=hj.weighted(term.method, term.weight),
            )
            for name, term in all_terms.items()
        },
        "hint_stage": step(hj.hint_stage, student, teacher, hint=hints),
    }
    if all(isinstance(module, WideResNet) for module in modules):
        ((guided, hint),) = zip(hints.student.hints, hints.teacher.hints, strict=True)
        ends = _cut(modules[0], hint, taught), _cut(modules[1], guided, start)
        (short_teacher, short_taught), (short, short_start) = ends
        weights = short_start, short_taught
        steps["hint_stage_cut"] = step(
            hj.hint_stage, short, short_teacher, weights, hint=hints
        )
        steps["cut_hint"] = step(
            hj.distillation_stage, short, None, weights, hint=alone["hint"]
        )
    return steps


def regressors_alone(
    pairs: hj.method.Pairs, sizing: regressors.Sizing, hints: Hints
) -> hj.Method:
    """One regressor for each pair, trained toward 0: FitNets without a teacher."""

    def modules(student):
        for guided, hint in pairs:
            shape, target = student.hints[guided].shape, hints[hint].shape
            yield guided, sizing(shape[1:], target[1:]), student.hints[guided]

    def init(key, student, teacher, data):
        made = {
            guided: regressors.init(module, key, x.shape)
            for guided, module, x in modules(student)
        }
        params = {guided: params for guided, (params, _) in made.items()}
        return params, {guided: memory for guided, (_, memory) in made.items()}

    def apply(params, memory, student, teacher, batch, context):
        total, remembered = 0.0, {}
        for guided, module, x in modules(student):
            predicted, remembered[guided] = regressors.apply(
                module, params[guided], memory[guided], x, context.train
            )
            total = total + _small(predicted)
        return total, remembered, {}

    wants = hj.Wants(hints=tuple(guided for guided, _ in pairs))
    return hj.Method(wants, hj.Wants(), init, apply)


def without_teacher(method: hj.Method, hints: Hints) -> hj.Method:
    """A method whose loss does not read the hints; it is given zeros as hints."""

    def zeros():
        shapes = {path: hints[path] for path in method.teacher.hints}
        return hj.Features(
            hints={path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
        )

    def init(key, student, teacher, data):
        return method.init(key, student, jax.eval_shape(zeros), data)

    def apply(params, memory, student, teacher, batch, context):
        return method.apply(params, memory, student, zeros(), batch, context)

    return hj.Method(method.student, hj.Wants(), init, apply)


def _small(predicted: jax.Array) -> jax.Array:
    """Half the mean square of each example: a cheap loss with a dense gradient."""
    return jnp.mean(jnp.square(predicted), tuple(range(1, predicted.ndim))) / 2


def plain(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    variables: hj.Variables,
    batch: Mapping[str, jax.Array],
) -> Made:
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
    heading = (
        f"{'program':24}{'trace s':>8}{'compile s':>11}{'step ms':>10}"
        f"{'95 %':>18}{'GFLOP':>9}"
    )
    lines = [setting, "", heading]
    for name, program in programs.items():
        step, flops = program["step_seconds"], program["flops"]
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(
            f"{name:24}{program['trace_seconds']:8.1f}{program['compile_seconds']:11.1f}"
            f"{1e3 * step['median']:10.2f}"
            f"{f'{low:.2f} - {high:.2f}':>18}"
            + (f"{'-':>9}" if flops is None else f"{flops / 1e9:9.2f}")
        )
    titles = {
        name: name if "/" in name else f"{name} / {' + '.join(row['parts'])}"
        for name, row in record["ratios"].items()
    }
    width = max(map(len, titles.values()), default=0)
    heading = f"{'over its parts':{width}}{'ratio':>8}{'95 %':>16}{'FLOPs':>8}  verdict"
    lines += ["", heading]
    for name, row in record["ratios"].items():
        time, flops = row["time"], row["flops"]
        interval = f"{time['low']:.3f} - {time['high']:.3f}"
        lines.append(
            f"{titles[name]:{width}}{time['median']:8.3f}{interval:>16}"
            + (f"{'-':>8}" if flops is None else f"{flops:8.4f}")
            + f"  {row['verdict']}"
        )
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws the ratios with their intervals and bars."""
    from matplotlib.figure import Figure

    height = 1.4 + 0.29 * len(record["ratios"])
    figure = Figure(figsize=(7, height), layout="constrained")
    axes, shown = figure.subplots(), {}
    for place, row in enumerate(record["ratios"].values()):
        time = row["time"]
        axes.plot([time["low"], time["high"]], [place, place], color="C0", lw=3)
        median = axes.plot(time["median"], place, "o", color="C0")
        shown["time: median, 95 % interval"] = median[0]
        if row["flops"] is not None:
            flops = axes.plot(row["flops"], place, "|", color="C1", ms=14, mew=2)
            shown["FLOPs"] = flops[0]
        if row["bar"] is not None:
            ends = [place - 0.4, place + 0.4]
            shown["bar"] = axes.plot(2 * [row["bar"]], ends, color="0.4", lw=1)[0]
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
    handles = shown.values(), shown.keys()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def _ratio(
    row: Row,
    programs: Mapping[str, measure.Program],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    time = measure.paired(seconds, row.whole, row.parts)
    counts = [programs[name].flops for name in (row.whole, *row.parts)]
    flops = None if None in counts else counts[0] / sum(counts[1:])
    return {
        "whole": row.whole,
        "parts": row.parts,
        "time": time,
        "flops": flops,
        "bar": row.bar,
        "verdict": measure.verdict(row.bar, time, flops, len(seconds[row.whole])),
    }


def _last(method: hj.Method) -> hj.Wants:
    """The last feature that a method wants of the teacher; earlier ones are free."""
    wants = method.teacher
    return hj.Wants(output=True) if wants.output else hj.Wants(hints=wants.hints[-1:])


def _teach(method: hj.Method) -> str:
    """The name of the teacher's forward pass for a method."""
    last = _last(method)
    return f"teach_{'output' if last.output else last.hints[0]}"


def _cut(
    module: WideResNet, path: str, variables: hj.Variables
) -> tuple[hj.Network, hj.Variables]:
    """The network that ends at groupN, with its weights up to there."""
    last = int(path.removeprefix("group"))
    kept = {"stem", *(f"group{number}" for number in range(1, last + 1))}
    params, stats = (
        {name: tree[name] for name in tree if name in kept}
        for tree in (variables.params, variables.state["batch_stats"])
    )
    return hj.linen(Cut(module, last)), hj.Variables(params, {"batch_stats": stats})


def _pair(text: str) -> tuple[str, str]:
    """Reads a pair from `guided->hint`."""
    guided, _, hint = text.partition("->")
    return guided, hint or guided


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="hintjax.models:wrn_40_2", help="package.module:factory")
    add("--student", default="hintjax.models:wrn_16_2", help="package.module:factory")
    pair = {"type": _pair, "nargs": "+", "metavar": "GUIDED->HINT"}
    add(
        "--pairs",
        **pair,
        default=GROUPS,
        help="pairs of layers, shallow to deep; FitNets takes the middle pair",
    )
    choices = tuple(dict.fromkeys([*CORE, *terms()]))
    add(
        "--methods",
        nargs="+",
        choices=[*choices, "all"],
        default=CORE,
        help="their names",
    )
    add("--negatives", type=int, default=16384, help="negatives that CRD draws")
    add("--examples", type=int, default=50_000, help="examples in CRD's memory bank")
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=32, help="height and width of the images")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=30, help="rounds to measure")
    add("--steps", type=int, default=1 if on_cpu else 50, help="steps in a round")
    add("--plot", type=Path, help="JSON file to draw, without measuring")
    options = parser.parse_args(arguments)
    if "all" in options.methods:
        options.methods = choices
    if options.small:
        options.negatives, options.examples = 16, 128
        options.teacher = options.student = f"{__name__}:wrn_10_1"
        options.batch, options.size = 4, 8
    return options


if __name__ == "__main__":
    # A cache would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
