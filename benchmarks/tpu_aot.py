"""Sharded steps compiled for TPU slices of 4 to 256 chips, without a TPU.

    pip install libtpu  # on Linux, the version that jax[tpu] needs
    python benchmarks/tpu_aot.py --out benchmarks/results/tpu_aot.json
    python benchmarks/tpu_aot.py --plot benchmarks/results/tpu_aot.json

Device: a CPU host; no program runs. Minutes: 60 on two busy cores. Expected: a modeled
efficiency from 4 to 256 v5e chips of at least 0.98, by bandwidth and without overlap,
except for two forms of CRD; for the hint stage, the FLOPs of two networks that end at
the hint.

The steps of `step_time.py` (WRN-40-2 teaches WRN-16-2, 128 images 32x32x3 on each chip)
and of two ViTs (B/16 teaches S/16, 32 images 224x224x3 on each chip) are compiled ahead
of time for slices of growing size. The number of images on each chip is fixed, so a
perfect slice takes the same time at every size. Each program gives its FLOPs, bytes and
memory for each chip, its collectives with their bytes, and XLA's own estimate of its
seconds (which ignores the interconnect).

The model of a step's time, in seconds, with the published constants of each chip:

    compute    the larger of FLOPs / peak and bytes / HBM bandwidth
    bandwidth  the bytes that each chip must send for its collectives (for an output of
               B bytes on n chips: 2 B (n-1)/n for a sum, B (n-1)/n for a gather, B
               for a step of a ring; for a scattered sum of B on each chip, B (n-1)),
               divided by the bandwidth of half of a chip's ports, because a slice
               that is not a whole torus has chips with only half of their links
    hops       1e-6 for each link that a collective crosses one after another: the
               sum of (side - 1) over the sides of the slice, twice for a sum; one
               for a step of a ring

    without overlap    compute + bandwidth          with overlap    the larger of them

The efficiency is the time of the smallest slice divided by the time of another slice.
The table gives it without hops and with hops. The second is pessimistic, because XLA
hides a part of the hops and latencies differ.

Programs are compiled with the least effort, which takes seconds instead of minutes.
FLOPs and collectives are the same as with the usual effort; schedules and memory may be
better there. XLA counts the body of a loop once. CRD by rows has two loops that usually
turn once (`hintjax.memory`), and here anchors are scored in one piece instead of four.

Conclusions from the committed numbers:

Distillation adds no collective to the 53 sums of the task. KD, AT, FitNets and FSP have
the same sums, and ReviewKD has 8 more, for the BatchNorms of its fusion. The bytes are
those of the gradients; they cost 1 % at 256 chips.

In a WRN, BatchNorm over the whole batch limits the scaling, not the teacher: it needs
about 50 small sums that wait for each other. If every hop took its microsecond, these
sums would take half of the time at 256 chips (efficiency 0.45 to 0.71). ViTs have no
BatchNorm and keep their efficiency (it is above 1, because XLA tiles the largest slice
better).

CRD reaches the bar with shared negatives and a bank that is split by rows (0.981 at
256): the shared rows are summed, 17 MB on any slice, and an example's embeddings are
sent only to the device that holds its rows. If every device holds the whole bank, every
device must receive and write the embeddings of the whole batch, 34 MB at 256 (0.757).
With a bank split by rows and separate negatives for each anchor, the efficiency is
0.946, and the step takes ten times as long, because TPUs gather single scores slowly
(29 of 32 GB).

bfloat16 in both networks halves the bytes (2.46 to 1.31 GB for WRNs, 27.8 to 15.7 for
ViTs). It also halves the bytes of the sums of the student's gradients, which XLA
computes in bfloat16. Arguments are padded to tiles: the arguments of WRNs take 1.3 to
1.7 times their bytes.

Constants: cloud.google.com/tpu/docs/v5e, v5p, v6e (peak of bfloat16, HBM bandwidth,
interconnect per chip and its ports); v4: Jouppi et al., TPU v4, ISCA 2023, table 4.
Hops: jax-ml.github.io/scaling-book, about a microsecond for each.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

# libtpu reads these when it is loaded: it looks for no TPU, and other processes may
# load it too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import measure
import optax
import step_time
from jax.experimental import topologies

import hintjax as hj
from hintjax.memory import rows
from hintjax.models import VisionTransformer, vit_small, wrn_16_2, wrn_40_2
from hintjax.networks import computed_in

EXAMPLES = 50_000
HOP = 1e-6


class Chip(NamedTuple):
    """Published constants of one chip, per second; a port's are for one direction."""

    flops: float
    hbm: float
    port: float
    ports: int
    options: Mapping[str, Any]  # of its topologies


CHIPS = {
    "v4": Chip(
        275e12,
        1200e9,
        50e9,
        6,
        {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)},
    ),
    "v5e": Chip(197e12, 819e9, 50e9, 4, {}),
    "v5p": Chip(459e12, 2765e9, 100e9, 6, {}),
    "v6e": Chip(918e12, 1638e9, 100e9, 4, {}),
}
ENDS = ((2, 2), (4, 4), (16, 16))
SLICES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


class Case(NamedTuple):
    """One program to compile."""

    pair: str  # "wrn" or "vit"
    method: str
    chip: str = "v5e"
    sides: tuple[int, ...] = (4, 4)
    fsdp: int = 1
    student: str = "float32"
    teacher: str = "float32"


class Pair(NamedTuple):
    """Teacher and student, with the sizes of their data and the pair of layers."""

    teacher: Any
    student: Any
    size: int
    classes: int
    batch: int  # on each chip
    hint: tuple[str, str]


PAIRS = {
    "wrn": Pair(wrn_40_2, wrn_16_2, 32, 100, 128, ("group2", "group2")),
    "vit": Pair(
        partial(VisionTransformer, 16, 768, 12, 12),
        partial(vit_small, patch=16),
        224,
        1000,
        32,
        ("block6", "block6"),
    ),
    "small": Pair(
        step_time.wrn_10_1, step_time.wrn_10_1, 8, 10, 2, ("group2", "group2")
    ),
}
CORE = (
    *("task", "kd", "attention_transfer", "fitnets", "hint_stage"),
    *("fsp", "crd_by_rows", "crd_shared", "crd_shared_by_rows", "review"),
)


def cases() -> list[Case]:
    """All programs of the benchmark."""
    wrn = [
        Case("wrn", name, sides=sides)
        for name in CORE
        for sides in (SLICES if name in ("kd", "hint_stage") else ENDS)
    ]
    vit = [
        Case("vit", name, sides=sides, student="bfloat16", teacher="bfloat16")
        for name in ("kd", "hint_stage")
        for sides in ENDS
    ]
    variants = [
        Case("wrn", "hint_stage_cut"),
        Case("wrn", "crd_anchor"),
        Case("wrn", "kd", teacher="bfloat16"),
        Case("wrn", "kd", student="bfloat16"),
        Case("wrn", "kd", student="bfloat16", teacher="bfloat16"),
        Case("wrn", "kd", fsdp=4),
        Case("vit", "kd"),
        Case("vit", "kd", "v5e", (4, 4), 4, "bfloat16", "bfloat16"),
    ]
    others = [
        Case("wrn", name, chip, sides)
        for chip, sides in (("v4", (2, 2, 4)), ("v5p", (2, 2, 4)), ("v6e", (4, 4)))
        for name in CORE
    ]
    return [*wrn, *vit, *variants, *others]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    if options.plot:
        record = json.loads(options.plot.read_text())
        print(table(record))
        plot(record, options.plot.with_suffix(".png"))
        return record
    chosen = [Case("small", options.small)] if options.small else cases()
    record = {"benchmark": "tpu_aot", "machine": machine(), "programs": []}
    done = []
    if options.out and options.out.exists():  # continues an interrupted run
        record = json.loads(options.out.read_text())
        done = [_case(row) for row in record["programs"]]
    for case in chosen:
        if case in done:
            continue
        mesh = devices(case, options.host)
        row = {**case._asdict(), **told(case, mesh)}
        record["programs"].append(row)
        seconds = f"{row['compile_seconds']:.0f} s"
        print(f"{len(record['programs'])} of {len(chosen)}: {_label(case)}, {seconds}")
        if options.out:
            measure.write(options.out, record)
    print(table(record))
    return record


def machine() -> dict[str, Any]:
    """The machine that compiled, and the versions of the compiler."""
    found = measure.machine()
    try:
        found["versions"]["libtpu"] = version("libtpu")
    except PackageNotFoundError:
        found["versions"]["libtpu"] = None
    return found


def devices(case: Case, host: bool) -> jax.sharding.Mesh:
    """The mesh of a slice that does not exist here, or of this host's own devices."""
    if host:
        chips = jax.devices()
    else:
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{case.chip}:{'x'.join(map(str, case.sides))}",
            **CHIPS[case.chip].options,
        )
        chips = topology.devices
    fsdp = case.fsdp if case.fsdp > 1 else None
    return hj.make_mesh(fsdp=fsdp, devices=chips)


def told(case: Case, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiles one program and returns its row of the record."""
    update, arguments = step(case, mesh)
    start = time.perf_counter()
    # XLA counts the body of a loop once, so all anchors are scored in one piece.
    with mock.patch.object(rows, "PIECES", 1):
        lowered = update.lower(*arguments)
    least = {"exec_time_optimization_effort": -1.0}
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    compiled = lowered.compile(least if on_tpu else None)
    seconds = time.perf_counter() - start
    row = {"chips": mesh.size, "compile_seconds": seconds}
    row |= counted(compiled, arguments)
    return row | modeled(row, CHIPS[case.chip], case.sides)


def counted(compiled: jax.stages.Compiled, arguments: tuple) -> dict[str, Any]:
    """The compiler's counts of a program: operations, bytes, memory, collectives."""
    costs, planned = compiled.cost_analysis() or {}, compiled.memory_analysis()
    sizes = {
        name: getattr(planned, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {
        "flops": costs.get("flops"),
        "bytes": costs.get("bytes accessed"),
        "optimal_seconds": costs.get("optimal_seconds"),
        "memory": {**sizes, "peak": peak, "argument_ideal": ideal(compiled, arguments)},
        "collectives": collectives(compiled.as_text()),
    }


class Setting(NamedTuple):
    """A stage of a case, with its networks and the shapes of a batch."""

    stage: hj.Stage
    student: hj.Network
    teacher: hj.Network | None
    method: hj.Method
    shapes: tuple[hj.Variables, hj.Variables | None]  # of student and teacher
    batch: dict[str, jax.ShapeDtypeStruct]
    data: hj.Data


def step(case: Case, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """The jitted step of a stage, and the shapes of its arguments."""
    made = setting(case, mesh)
    ours, theirs = made.shapes
    key = jax.eval_shape(partial(jax.random.key, 0))
    init = partial(made.stage.init, data=made.data)
    state = jax.eval_shape(init, key, ours, theirs, made.batch)
    return made.stage.update, (state, theirs, made.batch)


def setting(case: Case, mesh: jax.sharding.Mesh) -> Setting:
    """The stage of a case on a mesh."""
    pair = PAIRS[case.pair]
    student = hj.linen(pair.student(classes=pair.classes))
    teacher = hj.linen(pair.teacher(classes=pair.classes))
    n = pair.batch * mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((n, pair.size, pair.size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
        "index": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    key = jax.eval_shape(partial(jax.random.key, 0))
    one = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), jnp.float32)
    ours, theirs = (jax.eval_shape(net.init, key, one) for net in (student, teacher))
    make = hj.distillation_stage
    if case.method.startswith("hint_stage"):
        make = hj.hint_stage
    if case.method == "hint_stage_cut":
        guided, hint = pair.hint
        teacher, theirs = step_time._cut(
            pair.teacher(classes=pair.classes), hint, theirs
        )
        student, ours = step_time._cut(pair.student(classes=pair.classes), guided, ours)
    student, teacher = (
        net if dtype == "float32" else computed_in(net, dtype)
        for net, dtype in ((student, case.student), (teacher, case.teacher))
    )
    method = objective(case, mesh)
    if method.teacher == hj.Wants():
        teacher, theirs = None, None
    stage = make(student, teacher, method, optimizer(), mesh=mesh)
    data = hj.Data(jnp.arange(EXAMPLES, dtype=jnp.int32) % pair.classes)
    return Setting(stage, student, teacher, method, (ours, theirs), batch, data)


def optimizer() -> optax.GradientTransformation:
    """The optimizer of every step."""
    return optax.sgd(0.05, momentum=0.9)


def objective(case: Case, mesh: jax.sharding.Mesh) -> hj.Method:
    """A core method, with the weights of `step_time.py`."""
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    if case.method == "task":
        return hj.objective(task=task)
    if case.method.startswith("hint_stage"):
        sizing = hj.regressors.linear if case.pair == "vit" else step_time.HINT
        return hj.fitnets([PAIRS[case.pair].hint], regressor=sizing)
    if case.method.endswith("_by_rows"):
        shared = case.method == "crd_shared_by_rows"
        kind = hj.SharedNegatives() if shared else hj.AnchorNegatives()
        method = hj.crd(step_time.POOL, negatives=kind, mesh=mesh)
        return hj.objective(task=task, term=hj.weighted(method, 0.8))
    terms = step_time.terms()
    names = {"crd_shared": "crd", "crd_anchor": "crd:anchor"}
    term = terms[names.get(case.method, case.method)]
    return hj.objective(
        task=hj.weighted(task, term.task), term=hj.weighted(term.method, term.weight)
    )


OPERATION = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
BITS = {"pred": 8, "bf16": 16}


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts the collectives of a program by kind, and the bytes of their outputs.

    A collective in the body of a loop counts once for each turn of the loop.
    """
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
        elif computations:
            lines.append(line)
    turns = {}
    for condition, body in LOOP.findall(text):
        # A counting loop compares its counter with a constant, in its own computation.
        limits = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
        turns[body] = int(limits[0]) if len(limits) == 1 else 1
    found: dict[str, dict[str, int]] = {}
    for times, line in (
        (turns.get(name, 1), line)
        for name, lines in computations.items()
        for line in lines
    ):
        if not (match := OPERATION.search(line)):
            continue
        result, kind, started = match.groups()
        sizes = [_bytes(*array) for array in ARRAY.findall(result)]
        if started and kind == "all-gather":  # lists operands, then results
            sizes = sizes[len(sizes) // 2 :]
        if started and kind == "collective-permute":  # then semaphores
            sizes = sizes[:1]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += times
        entry["bytes"] += sum(sizes) * times
    return found


def _bytes(dtype: str, shape: str) -> int:
    bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def ideal(compiled: jax.stages.Compiled, arguments: tuple) -> int:
    """Bytes of a chip's arguments if no array were padded."""
    shapes, structure = jax.tree.flatten(arguments)
    placed = structure.flatten_up_to(compiled.input_shardings[0])
    return sum(
        math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        for shape, sharding in zip(shapes, placed, strict=True)
        if sharding is not None  # the program does not read the argument
    )


def modeled(row: Mapping[str, Any], chip: Chip, sides: Sequence[int]) -> dict[str, Any]:
    """Seconds of a step, by the model at the top of this file."""
    n, diameter = row["chips"], sum(side - 1 for side in sides)
    sent = crossed = 0.0
    for kind, entry in row["collectives"].items():
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        share["collective-permute"] = 1
        links = {"all-reduce": 2 * diameter, "collective-permute": 1}
        sent += entry["bytes"] * share.get(kind, (n - 1) / n)
        crossed += entry["count"] * links.get(kind, diameter)
    compute = max((row["flops"] or 0) / chip.flops, (row["bytes"] or 0) / chip.hbm)
    bandwidth = sent / (chip.port * chip.ports / 2)
    return {
        "compute_seconds": compute,
        "bandwidth_seconds": bandwidth,
        "hop_seconds": crossed * HOP,
        "bound": "HBM" if compute > (row["flops"] or 0) / chip.flops else "FLOPs",
    }


def efficiencies(record: Mapping[str, Any]) -> dict[Case, dict[str, float]]:
    """The time of the smallest slice over the time of each other, for each program."""

    def seconds(row: Mapping[str, Any]) -> dict[str, float]:
        compute, bandwidth = row["compute_seconds"], row["bandwidth_seconds"]
        return {
            "without overlap": compute + bandwidth,
            "with overlap": max(compute, bandwidth),
            "with hops": compute + bandwidth + row["hop_seconds"],
        }

    programs = {_case(row): row for row in record["programs"]}
    found = {}
    for case, row in programs.items():
        alike = [r for c, r in programs.items() if c._replace(sides=case.sides) == case]
        least = seconds(min(alike, key=lambda r: r["chips"]))
        found[case] = {k: least[k] / v for k, v in seconds(row).items() if v}
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    found = efficiencies(record)
    heading = (
        f"{'program':44} {'chips':>5} {'GFLOP':>7} {'GB':>6} {'peak MiB':>8} "
        f"{'collectives':>18} {'MB':>7} {'XLA ms':>7} {'ms':>6} "
        f"{'eff':>6} {'overlap':>7} {'hops':>6}"
    )
    lines = [heading]
    for row in record["programs"]:
        case, ours = _case(row), found[_case(row)]
        kinds = row["collectives"]
        counts = " ".join(
            f"{entry['count']}{''.join(w[0] for w in kind.split('-'))}"
            for kind, entry in sorted(kinds.items())
        )
        sent = sum(entry["bytes"] for entry in kinds.values()) / 1e6
        total = row["compute_seconds"] + row["bandwidth_seconds"]
        lines.append(
            f"{_label(case):44} {row['chips']:5} {(row['flops'] or 0) / 1e9:7.1f} "
            f"{(row['bytes'] or 0) / 1e9:6.2f} {row['memory']['peak'] / 2**20:8.0f} "
            f"{counts:>18} {sent:7.2f} {(row['optimal_seconds'] or 0) * 1e3:7.2f} "
            f"{total * 1e3:6.2f} "
            + " ".join(f"{ours.get(k, math.nan):6.3f}" for k in KINDS)
        )
    return "\n".join(lines)


KINDS = ("without overlap", "with overlap", "with hops")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws the efficiency by chips, for programs with three slices or more."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    found = efficiencies(record)
    lines: dict[Case, list[tuple[int, dict[str, float]]]] = {}
    for row in record["programs"]:
        case = _case(row)
        lines.setdefault(case._replace(sides=()), []).append(
            (row["chips"], found[case])
        )
    for case, points in lines.items():
        if len(points) < 3:
            continue
        chips, values = zip(*sorted(points, key=lambda p: p[0]), strict=True)
        for axes, kind in ((left, "without overlap"), (right, "with hops")):
            axes.plot(chips, [v[kind] for v in values], ".-", label=_label(case))
            axes.set(title=kind, xlabel="v5e chips", xscale="log", ylim=(0, 1.05))
            axes.set_xticks(chips, map(str, chips))
            axes.grid(alpha=0.3)
    left.axhline(0.95, color="k", lw=0.8, ls="--")
    left.set_ylabel("modeled weak-scaling efficiency")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _label(case: Case) -> str:
    words = [case.chip, case.pair, case.method]
    words += [f"fsdp{case.fsdp}"] if case.fsdp > 1 else []
    low = [name for name in ("student", "teacher") if getattr(case, name) != "float32"]
    words += [f"bf16 {'+'.join(low)}"] if low else []
    return " ".join(words)


def _case(row: Mapping[str, Any]) -> Case:
    case = Case(**{name: row[name] for name in Case._fields})
    return case._replace(sides=tuple(case.sides))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="JSON file to write, or to continue if it exists")
    add("--plot", type=Path, help="JSON file to draw, without compiling")
    add("--small", metavar="METHOD", help="compile one tiny program of this method")
    add("--host", action="store_true", help="compile for this host's devices, no TPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
