"""Every core method and both stages on the devices of this machine.

    python benchmarks/on_device.py --out FILE
    python benchmarks/on_device.py --plot FILE

Device: all TPU chips or GPUs of one host; on a CPU use `--small`. Minutes: about 10 on
an accelerator, most of them compilation.

The steps are those of `tpu_aot.py`: WRN-40-2 teaches WRN-16-2 with 128 images 32x32x3
on each device. For each method the table gives images per second, the step's time, the
part of the chip's peak FLOPs and HBM bandwidth that the step reaches, the seconds of
compilation, the time that the model of `tpu_aot.py` predicts (without overlap), and the
time of the same step with a cached teacher, divided by the live step's time in the same
round. Operations and bytes are counted by the compiler. Peaks are known for TPUs; they
are for bfloat16, and these networks compute in float32, which TPUs multiply as
bfloat16 by default. At the end, 8 students learn under one teacher (`population.py`).
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import population
import tpu_aot

import hintjax as hj
from hintjax import cache

METHODS = tpu_aot.CORE
# Names that jax gives the chips.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    if options.plot:
        record = json.loads(options.plot.read_text())
        print(table(record))
        plot(record, options.plot.with_suffix(".png"))
        return record
    mesh = hj.data_mesh()
    chip = KINDS.get(jax.devices()[0].device_kind)
    record = {
        "benchmark": "on_device",
        "machine": measure.machine(),
        "devices": mesh.size,
        "chip": chip,
        "rounds": options.rounds,
        "steps": options.steps,
        "programs": {},
        "population": None,
    }
    for method in options.methods:
        case = tpu_aot.Case("small" if options.small else "wrn", method)
        record["programs"][method] = measured(case, mesh, chip, options)
        print(f"{method}: {record['programs'][method]['images_per_second']:,.0f} img/s")
        if options.out:
            measure.write(options.out, record)
    if not options.no_population:
        record["population"] = _population(options)
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def measured(
    case: tpu_aot.Case,
    mesh: jax.sharding.Mesh,
    chip: str | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measures the live step of a method and, with a teacher, its cached step."""
    made = tpu_aot.setting(case, mesh)
    state, rest = _ready(made, mesh)
    program = measure.compiled(made.stage.update, state, *rest)
    runs = {"live": measure.running(program.call, state, rest)}
    if made.teacher is not None:
        update, state, given = _cached(case, made, mesh, rest)
        runs["cached"] = measure.running(update, state, given)
    seconds = measure.interleave(runs, options.rounds, options.steps)
    time = measure.summary(seconds["live"])
    row = {
        "step_seconds": time,
        "images_per_second": made.batch["image"].shape[0] / time["median"],
        "compile_seconds": program.compile_seconds,
        **tpu_aot.counted(program.call, (state, *rest)),
        "cached_over_live": None,
    }
    if "cached" in runs:
        row["cached_over_live"] = measure.paired(seconds, "cached", ["live"])
    if chip is not None:
        row |= _against_peaks(row, tpu_aot.CHIPS[chip], mesh)
    return row


def _against_peaks(
    row: Mapping[str, Any], chip: tpu_aot.Chip, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """The parts of the chip's peaks, and the seconds that the model predicts."""
    coordinates = zip(*(device.coords for device in mesh.devices.flat), strict=True)
    sides = [max(axis) - min(axis) + 1 for axis in coordinates]
    known = {"chips": mesh.size, "flops": row["flops"], "bytes": row["bytes"]}
    known["collectives"] = row["collectives"]
    model = tpu_aot.modeled(known, chip, sides)
    seconds = row["step_seconds"]["median"]
    return {
        "flops_utilization": (row["flops"] or math.nan) / seconds / chip.flops,
        "hbm_utilization": (row["bytes"] or math.nan) / seconds / chip.hbm,
        "predicted_seconds": model["compute_seconds"] + model["bandwidth_seconds"],
    }


def _ready(made: tpu_aot.Setting, mesh: jax.sharding.Mesh) -> tuple[Any, tuple]:
    """A state with random weights, the teacher's weights and a random batch."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    shape = made.batch["image"].shape
    numbers = jnp.arange(shape[0], dtype=jnp.int32)
    batch = {
        "image": jax.random.normal(keys[0], shape),
        "label": jnp.asarray(made.data.labels)[numbers],
        "index": numbers,
        "view": jnp.zeros_like(numbers),
    }
    one = batch["image"][:1]
    batch = jax.device_put(batch, hj.sharding.over_batch(mesh))
    ours, theirs = made.student.init(keys[1], one), None
    if made.teacher is not None:
        theirs = hj.sharding.place(made.teacher.init(keys[2], one), mesh)
    state = made.stage.init(keys[3], ours, theirs, batch, data=made.data)
    return state, (theirs, batch)


def _cached(
    case: tpu_aot.Case, made: tpu_aot.Setting, mesh: jax.sharding.Mesh, rest: tuple
) -> tuple[Any, Any, tuple]:
    """The same step with the teacher's features as bfloat16 rows on the devices."""
    taught, batch = rest
    keys = jax.random.split(jax.random.key(1, impl="rbg"))
    start = made.student.init(keys[0], batch["image"][:1])
    plan = cache.contents(
        *(made.student, made.teacher, made.method, start, taught, batch),
        coding="bfloat16",
        examples=batch["image"].shape[0],
    )
    rows = jax.device_get(jax.jit(lambda *x: plan.encode(plan.features(*x)))(*rest))
    stored = hj.sharding.place(cache.variables_of(taught, cache.flat(rows)), mesh)
    hints = case.method.startswith("hint_stage")
    make = hj.hint_stage if hints else hj.distillation_stage
    stage = make(
        *(made.student, plan.network, plan.reading(made.method), tpu_aot.optimizer()),
        mesh=mesh,
        teacher_inputs=plan.inputs,
    )
    state = stage.init(keys[1], start, stored, batch, data=made.data)
    return stage.update, state, (stored, batch)


def _population(options: argparse.Namespace) -> dict[str, Any]:
    """The cost of one of 8 students, of the CNN and of the ViT."""
    asked = ["--small"] if options.small else ["--students", "8", "--batch", "128"]
    asked += ["--rounds", f"{options.rounds}", "--steps", f"{options.steps}"]
    return population.main(asked)["networks"]


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    heading = (
        f"{'step':22}{'images/s':>12}{'ms':>9}{'FLOPs':>8}{'HBM':>8}"
        f"{'predicted':>11}{'compile s':>11}{'cached/live':>13}"
    )
    devices = f"{record['devices']} x {machine['device']}"
    lines = [f"{devices}, jax {machine['versions']['jax']}", heading]
    for name, row in record["programs"].items():
        shown = [
            _share(row.get("flops_utilization")),
            _share(row.get("hbm_utilization")),
        ]
        predicted = row.get("predicted_seconds")
        cached = row["cached_over_live"]
        lines.append(
            f"{name:22}{row['images_per_second']:12,.0f}"
            f"{1e3 * row['step_seconds']['median']:9.2f}{shown[0]:>8}{shown[1]:>8}"
            f"{'-' if predicted is None else f'{1e3 * predicted:.2f}':>11}"
            f"{row['compile_seconds']:11.1f}"
            f"{'-' if cached is None else '{:.2f}'.format(cached['median']):>13}"
        )
    for name, found in (record["population"] or {}).items():
        for form, student in found["students"].items():
            cost = student["cost"]["median"]
            lines.append(f"{name}, {form}: one student costs {cost:.2f} of a run alone")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    """A part of a peak, in percent."""
    return "-" if value is None else f"{value:.0%}"


def plot(record: Mapping[str, Any], path: Path | None) -> Any:
    """Draws images per second, and measured against predicted times if there are any.

    Args:
        record: the record.
        path: the file to write; None for none.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    programs = record["programs"]
    places = range(len(programs))
    names = [name.replace("_", " ") for name in programs]
    speeds = [row["images_per_second"] for row in programs.values()]
    left.barh(places, speeds)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlabel("images per second, all devices")
    measured = [1e3 * row["step_seconds"]["median"] for row in programs.values()]
    right.plot(measured, places, "o", label="measured")
    if all("predicted_seconds" in row for row in programs.values()):
        predicted = [1e3 * row["predicted_seconds"] for row in programs.values()]
        right.plot(predicted, places, "|", ms=14, label="predicted")
    right.set_yticks(places, [])
    right.invert_yaxis()
    right.set_xlabel("ms per step")
    right.set_xlim(left=0)
    right.legend()
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="their names")
    add("--rounds", type=int, default=10, help="rounds to measure")
    add("--steps", type=int, default=50, help="steps in a round")
    add("--small", action="store_true", help="run tiny networks, as a test")
    add("--no-population", action="store_true", help="leave out the 8 students")
    add("--out", type=Path, help="JSON file to write the results to")
    add("--plot", type=Path, help="JSON file to draw, without measuring")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # A cache of programs would hide the compile times, which are results.
    jax.config.update("jax_enable_compilation_cache", False)
    main()
