"""Two ways to compute the losses of many pairs: a loop, or vmap over the pairs.

    python benchmarks/pairs.py --out benchmarks/results/pairs_cpu.json
    python benchmarks/pairs.py --plot benchmarks/results/pairs_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 4. Expected, for 16
pairs, relative to the loop: attention reduced 1.0, stacked 3.7; hints stacked 1.3.

The benchmark computes the value and gradient of the losses of n pairs of layers, with
feature maps 16x16x64 of 64 examples, for n = 1, 2, 4, 8, 16, in these forms:

    attention  loop      one pair after another
               reduced   first the attention maps of each pair, then vmap over the pairs
               stacked   feature maps are stacked, then vmap over everything
    hint       loop      one pair after another, each with its linear regressor
               stacked   feature maps and regressors are stacked, then vmap

Ratios compare a form with the loop over the same number of pairs, in the same rounds.

The committed numbers decide what the methods do:

Attention methods reduce feature maps to attention maps, then vmap over the pairs. This
takes the time and memory of the loop at every n (ratios 0.85 to 1.05), and more time to
compile: 1.0 s instead of 0.4 s for 16 pairs. It brings no speed on CPU; on devices
where one kernel is faster than n small ones, it can only help. Feature maps must never
be stacked before the reduction: from two pairs on, this takes 2 to 7 times the time of
the loop and about 60 times its memory.

Hint methods loop over the pairs. From two pairs on, stacking takes 1.3 to 1.7 times the
time, 1.7 to 2 times the memory, and 4 to 11 times the compile time, for the same FLOPs.
(A single stacked pair is faster, at 0.64, because XLA's CPU backend compiles the
gradients of a batched matrix product to faster kernels. With more pairs, the copies
cost more than this saves.)
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

import hintjax as hj
from hintjax.losses import (
    attention_map_loss,
    attention_maps,
    attention_transfer_loss,
    hint_loss,
)

Maps = Sequence[jax.Array]
Params = Sequence[dict[str, jax.Array]]


def attention_loop(params: Params, students: Maps, teachers: Maps) -> jax.Array:
    """AT of all pairs, one pair after another."""
    return sum(map(attention_transfer_loss, students, teachers)).mean()


def attention_reduced(params: Params, students: Maps, teachers: Maps) -> jax.Array:
    """AT of all pairs by vmap over the attention maps."""
    maps = [attention_maps(*pair) for pair in zip(students, teachers, strict=True)]
    return hj.over_pairs(attention_map_loss)(*zip(*maps, strict=True)).mean()


def attention_stacked(params: Params, students: Maps, teachers: Maps) -> jax.Array:
    """AT of all pairs by vmap over the feature maps."""
    return hj.over_pairs(attention_transfer_loss)(students, teachers).mean()


def regressed_loss(
    params: dict[str, jax.Array], student: jax.Array, teacher: jax.Array
) -> jax.Array:
    """The hint loss after a linear regressor."""
    return hint_loss(student @ params["kernel"] + params["bias"], teacher)


def hint_loop(params: Params, students: Maps, teachers: Maps) -> jax.Array:
    """The hint loss of all pairs, one pair after another."""
    return sum(map(regressed_loss, params, students, teachers)).mean()


def hint_stacked(params: Params, students: Maps, teachers: Maps) -> jax.Array:
    """The hint loss of all pairs by vmap over feature maps and regressors."""
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    losses = jax.vmap(regressed_loss)(params, jnp.stack(students), jnp.stack(teachers))
    return losses.sum(0).mean()


FORMS = {
    "attention": {
        "loop": attention_loop,
        "reduced": attention_reduced,
        "stacked": attention_stacked,
    },
    "hint": {"loop": hint_loop, "stacked": hint_stacked},
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    if options.plot:
        record = json.loads(options.plot.read_text())
        plot(record, options.plot.with_suffix(".png"))
        return record
    machine = measure.machine()
    results = {
        name: [
            {"pairs": pairs} | _measured(forms, pairs, options)
            for pairs in options.pairs
        ]
        for name, forms in FORMS.items()
    }
    record = {
        "benchmark": "pairs",
        "machine": machine,
        "batch": options.batch,
        "map": [options.size, options.size, options.channels],
        "rounds": options.rounds,
        "steps": options.steps,
        "compilations": options.compilations,
        "losses": results,
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _measured(
    forms: Mapping[str, Callable[..., jax.Array]],
    pairs: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measures all forms of one loss at one number of pairs."""
    arguments = _arguments(pairs, options)
    compiled = {form: [] for form in forms}
    for _ in range(options.compilations):
        for form, loss in forms.items():
            learning = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            compiled[form].append(measure.compiled(learning, *arguments))
    programs = {form: _typical(several) for form, several in compiled.items()}
    runs = {form: partial(one.call, *arguments) for form, one in programs.items()}
    values = {form: float(run()[0]) for form, run in runs.items()}
    # All forms compute the same number.
    np.testing.assert_allclose(list(values.values()), values["loop"], rtol=1e-4)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    return {
        form: program.record(seconds[form])
        | {"over_loop": measure.paired(seconds, form, ["loop"])}
        for form, program in programs.items()
    }


def _typical(programs: Sequence[measure.Program]) -> measure.Program:
    """One of the compilations, with the median of their seconds."""
    return programs[0]._replace(
        trace_seconds=float(np.median([one.trace_seconds for one in programs])),
        compile_seconds=float(np.median([one.compile_seconds for one in programs])),
    )


def _arguments(pairs: int, options: argparse.Namespace) -> tuple[Params, Maps, Maps]:
    keys = jax.random.split(jax.random.key(0), 3 * pairs)
    shape = (options.batch, options.size, options.size, options.channels)
    square = (options.channels, options.channels)
    students, teachers = (
        [jax.random.normal(key, shape) for key in keys[start : start + pairs]]
        for start in (0, pairs)
    )
    params = [
        {
            "kernel": jax.random.normal(key, square) / options.channels,
            "bias": jnp.zeros(options.channels),
        }
        for key in keys[2 * pairs :]
    ]
    return params, students, teachers


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"map {record['map']}, batch {record['batch']}, {record['rounds']} rounds of "
        f"{record['steps']} on {machine['device']} ({machine['processor']}), jax "
        f"{machine['versions']['jax']}"
    )
    columns = (
        f"{'pairs':>6}{'trace s':>9}{'compile s':>11}{'temp MB':>9}{'MFLOP':>9}"
        f"{'step ms':>9}{'over loop':>11}{'95 %':>16}"
    )
    lines = [setting]
    for name, counts in record["losses"].items():
        lines += ["", f"{name:10}{columns}"]
        for count in counts:
            for form in FORMS[name]:
                one = count[form]
                over = one["over_loop"]
                interval = f"{over['low']:.3f} - {over['high']:.3f}"
                lines.append(
                    f"{form:10}{count['pairs']:6}{one['trace_seconds']:9.2f}"
                    f"{one['compile_seconds']:11.2f}{_scaled(one['temp_bytes']):>9}"
                    f"{_scaled(one['flops']):>9}"
                    f"{1e3 * one['step_seconds']['median']:9.2f}"
                    f"{over['median']:11.3f}{interval:>16}"
                )
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws time, memory and compile time over the number of pairs."""
    from matplotlib.figure import Figure

    quantities = {
        "step / loop": lambda one: one["over_loop"]["median"],
        "temporary memory, MB": lambda one: (one["temp_bytes"] or 0) / 1e6,
        "compile, s": lambda one: one["compile_seconds"],
    }
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    grid = figure.subplots(len(FORMS), 3, sharex=True)
    for row, (name, forms) in zip(grid, FORMS.items(), strict=True):
        counts = record["losses"][name]
        pairs = [count["pairs"] for count in counts]
        for axes, (title, read) in zip(row, quantities.items(), strict=True):
            for form in forms:
                values = [read(count[form]) for count in counts]
                axes.plot(pairs, values, "o-", label=f"{name}: {form}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(pairs, pairs)
            axes.set_ylim(bottom=0)
            axes.set_title(title, fontsize=9)
        row[0].legend(fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("pairs")
    figure.savefig(path, dpi=100)


def _scaled(number: float | None) -> str:
    return "-" if number is None else f"{number / 1e6:.1f}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add(
        "--pairs",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="numbers of pairs",
    )
    add("--batch", type=int, default=64, help="examples in a batch")
    add("--size", type=int, default=16, help="height and width of the maps")
    add("--channels", type=int, default=64, help="channels of the maps")
    on_cpu = jax.default_backend() == "cpu"
    add("--rounds", type=int, default=30, help="rounds to measure")
    add("--steps", type=int, default=3 if on_cpu else 50, help="steps in a round")
    add("--compilations", type=int, default=5, help="compilations of each program")
    add("--plot", type=Path, help="JSON file to draw, without measuring")
    options = parser.parse_args(arguments)
    if options.small:
        options.pairs, options.compilations = [1, 2], 1
        options.batch, options.size, options.channels = 2, 4, 8
    return options


if __name__ == "__main__":
    # A cache would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
