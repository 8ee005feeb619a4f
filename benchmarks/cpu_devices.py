"""When a batch is worth sharing between the cores of a CPU.

    python benchmarks/cpu_devices.py --out benchmarks/results/cpu_devices.json

Device: a CPU. Minutes on two cores: 3. Leave the machine alone meanwhile. Expected: a
step of a small network is slower on several devices. With jax 0.10 a step of a large
network is faster on them, from about 4e8 operations per device: the command shares a
batch from there (`hintjax.experiments.devices.WORTH`).

Each case is a step of KD on one device, and on as many data-parallel devices as there
are cores, in one process that has all of them. Each round times all programs once, in a
new order. A ratio divides the times of one round. The operations are those of the
student's forward pass of its share of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import optax

import hintjax as hj
from hintjax import models
from hintjax.experiments.devices import WORTH, forward_flops, split_cpu


class Case(NamedTuple):
    """Networks and a batch.

    Attributes:
        student: factory of the student.
        teacher: factory of the teacher.
        image: height, width and channels.
        batch: number of images.
    """

    student: Callable[[int], Any]
    teacher: Callable[[int], Any]
    image: tuple[int, int, int]
    batch: int


PLAIN = (models.plain_thin, models.plain_wide)
RESIDUAL = (models.wrn_16_1, models.wrn_16_2)
CASES = {
    "plain, 8 pixels, batch 16": Case(*PLAIN, (8, 8, 1), 16),
    "plain, 8 pixels, batch 128": Case(*PLAIN, (8, 8, 1), 128),
    "plain, 28 pixels, batch 16": Case(*PLAIN, (28, 28, 1), 16),
    "plain, 28 pixels, batch 64": Case(*PLAIN, (28, 28, 1), 64),
    "WRN-16-1, 32 pixels, batch 16": Case(*RESIDUAL, (32, 32, 3), 16),
    "WRN-16-1, 32 pixels, batch 128": Case(*RESIDUAL, (32, 32, 3), 128),
}
SMALL = {"plain, 8 pixels, batch 8": Case(*PLAIN, (8, 8, 1), 8)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    made = measure.parser(__doc__)
    made.add_argument("--rounds", type=int, default=12, help="rounds to measure")
    made.add_argument("--steps", type=int, default=5, help="steps in a round")
    options = made.parse_args(arguments)
    split_cpu()
    rows = {
        name: _row(case, options.rounds, options.steps)
        for name, case in (SMALL if options.small else CASES).items()
    }
    record = {
        "benchmark": "cpu_devices",
        "machine": measure.machine(),
        "devices": jax.device_count(),
        "rounds": options.rounds,
        "steps": options.steps,
        "rows": rows,
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _row(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """The times of one case, and their ratio."""
    runs = {"one": _step(case, shared=False), "all": _step(case, shared=True)}
    seconds = measure.interleave(runs, rounds, steps)
    student, image = hj.linen(case.student(10)), jnp.zeros((1, *case.image))
    variables = jax.eval_shape(student.init, jax.random.key(0), image)
    flops = case.batch * (forward_flops(student, variables, image) or 0)
    return {
        "flops_per_device": flops / jax.device_count(),
        "one": measure.summary(seconds["one"]),
        "all": measure.summary(seconds["all"]),
        "all_over_one": measure.paired(seconds, "all", ["one"]),
    }


def _step(case: Case, *, shared: bool) -> Callable[[], Any]:
    """One step of KD, on all devices or on the first."""
    student, teacher = hj.linen(case.student(10)), hj.linen(case.teacher(10))
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "image": jax.random.normal(keys[0], (case.batch, *case.image)),
        "label": jnp.zeros(case.batch, jnp.int32),
    }
    taught = teacher.init(keys[1], batch["image"])
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    mesh = hj.data_mesh() if shared else None
    stage = hj.distillation_stage(
        student,
        teacher,
        hj.objective(task=task, kd=hj.kd(temperature=4.0)),
        optax.adam(1e-6),
        mesh=mesh,
    )
    state = stage.init(keys[2], student.init(keys[3], batch["image"]), taught, batch)
    if mesh is not None:
        taught = hj.sharding.place(taught, mesh)
        batch = jax.device_put(batch, hj.sharding.over_batch(mesh))
    return measure.running(stage.update, state, (taught, batch))


def table(record: Mapping[str, Any]) -> str:
    """The record as text."""
    machine = record["machine"]
    setting = (
        f"{record['devices']} devices ({machine['processor']}), {record['rounds']} "
        f"rounds of {record['steps']}; the command shares a batch from {WORTH:.0e} "
        "operations per device"
    )
    lines = [
        *(setting, ""),
        f"{'step':32}{'per device':>12}{'one':>12}{'all':>12}{'all / one':>12}",
    ]
    for name, row in record["rows"].items():
        times = "".join(f"{1e3 * row[one]['median']:9.1f} ms" for one in ("one", "all"))
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["all_over_one"])
        lines.append(f"{name:32}{row['flops_per_device']:12.1e}{times}  {ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
