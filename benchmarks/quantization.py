"""What rounding costs a student, and what training with the rounding gives back.

    python benchmarks/quantization.py --out benchmarks/results/quantization_cpu.json

Device: any; the committed numbers are from two CPU cores. Minutes: 6 there, on a
machine with other work. Expected accuracy of `aware` minus `continued`, in points: 0 at
8 bits, 0.8 at 4 bits (which can be chance), 76 at 2 bits.

The digits of scikit-learn; resnet20 teaches resnet8: task, KD and a hint of a middle
layer. There is one teacher. For each seed of the student:

    float      the student, trained in floating point
    rounded    the same student, rounded after training: kernels to integers of 8, 4
               or 2 bits, inputs of layers to 8 bits, with ranges of 256 training images
    continued  the student, trained further in floating point, then rounded
    aware      the student, trained further for as long with the rounding in its forward
               pass (hintjax.fake_quantized), from the same start, with the same batches

`aware` and `continued` have the same number of steps, and `aware - continued` is the
gain of the rounding in training; the column 95 % is its t-interval over the seeds.

The committed numbers: 8 bits cost nothing here, with or without training for them (98.1
% in floating point and rounded), so there is nothing to gain. At 4 bits, the student
that was trained with the rounding has the accuracy of the float student (98.1 %); the
one that was rounded after training has 97.3 %, a difference that three seeds do not
tell from chance. At 2 bits (the weights -1, 0, 1 times a scale), rounding after
training leaves 15 %, and training with the rounding gives 91 %.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import hintjax as hj
from hintjax import models
from hintjax.data import Dataset, load
from hintjax.experiments.statistics import paired

NETWORKS = (models.resnet20, models.resnet8, "group2")  # teacher, student, both layers
SMALL = (*(partial(models.plain_thin, depth=3),) * 2, "conv2")
BATCH = 64
KEY = jax.random.key(0, impl="rbg")


class Images(NamedTuple):
    """Standardized images with labels."""

    image: np.ndarray
    label: np.ndarray


class Learner(NamedTuple):
    """A network, the stage that trains it, and the number of epochs."""

    network: hj.Network
    stage: hj.Stage
    epochs: int


class Setting(NamedTuple):
    """The compiled programs and the data of all seeds."""

    train: Images
    test: Images
    teacher: Learner
    student: Learner
    continued: Learner
    aware: dict[str, Learner]
    classes: Callable[..., jax.Array]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    setting = _setting(load("digits", limit=options.limit), options)
    start = setting.teacher.network.init(KEY, jnp.asarray(setting.train.image[:1]))
    teacher = _learned(setting.teacher, setting.train, start, None, 0)
    told = _accuracy(setting, setting.teacher.network, teacher)
    print(f"teacher: {told:.4f}", flush=True)
    runs = []
    for seed in range(options.seeds):
        runs.append(_of_seed(setting, teacher, seed))
        print(f"seed {seed}: {runs[-1]}", flush=True)
    record = {
        "benchmark": "quantization",
        "machine": machine,
        "train": len(setting.train.label),
        "test": len(setting.test.label),
        "epochs": {
            "teacher": options.teacher_epochs,
            "student": options.epochs,
            "more": options.more,
        },
        "rate": options.rate,
        "teacher": told,
        "runs": runs,
        "gain": {
            bits: _gain([run["bits"][bits] for run in runs]) for bits in setting.aware
        },
    }
    print(table(record))
    if options.out:
        measure.write(options.out, record)
    return record


def _setting(dataset: Dataset, options: argparse.Namespace) -> Setting:
    """The networks and their stages; each stage is compiled once for all seeds."""
    train, test = (_standardized(dataset, part) for part in ("train", "test"))
    *makes, layer = SMALL if options.small else NETWORKS
    teacher, student = (hj.linen(make(classes=dataset.classes)) for make in makes)
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    hint = hj.fitnets([(layer, layer)])
    method = hj.objective(task=task, kd=hj.kd(), hint=hint)
    per_epoch = len(train.label) // BATCH

    def learner(network: hj.Network, epochs: int, rate: float) -> Learner:
        decay = optax.cosine_decay_schedule(rate, epochs * per_epoch)
        stage = hj.distillation_stage(network, teacher, method, optax.adam(decay))
        return Learner(network, stage, epochs)

    alone = hj.distillation_stage(
        teacher, None, hj.objective(task=task), optax.adam(1e-3)
    )

    @partial(jax.jit, static_argnums=0)
    def classes(apply, variables, image):
        shown, _ = apply(*variables, image, wants=hj.Wants(output=True), train=False)
        return jnp.argmax(shown.output, -1)

    return Setting(
        train,
        test,
        Learner(teacher, alone, options.teacher_epochs),
        learner(student, options.epochs, 1e-3),
        learner(student, options.more, options.rate),
        {
            str(bits): learner(
                hj.fake_quantized(student, weight_bits=bits), options.more, options.rate
            )
            for bits in options.bits
        },
        classes,
    )


def _of_seed(setting: Setting, teacher: hj.Variables, seed: int) -> dict[str, Any]:
    """The accuracies of one seed of the student."""
    train, network = setting.train, setting.student.network
    start = network.init(jax.random.fold_in(KEY, seed), jnp.asarray(train.image[:1]))
    student = _learned(setting.student, train, start, teacher, seed)
    further = _learned(setting.continued, train, student, teacher, seed + 100)
    spread = jnp.asarray(train.image[:: max(1, len(train.label) // 256)][:256])
    ranges, later = (
        hj.calibrated(network, variables, spread) for variables in (student, further)
    )

    def rounded(learner: Learner) -> dict[str, float]:
        aware = _learned(learner, train, ranges, teacher, seed + 100)
        return {
            name: _accuracy(setting, learner.network, variables)
            for name, variables in (
                ("rounded", ranges),
                ("continued", later),
                ("aware", aware),
            )
        }

    return {
        "float": _accuracy(setting, network, student),
        "continued": _accuracy(setting, network, further),
        "bits": {bits: rounded(learner) for bits, learner in setting.aware.items()},
    }


def _learned(
    learner: Learner,
    train: Images,
    start: hj.Variables,
    teacher: hj.Variables | None,
    seed: int,
) -> hj.Variables:
    """The variables after the training; equal seeds have equal batches."""
    first = next(_batches(train, 1, seed))
    key = jax.random.fold_in(KEY, seed)
    state = learner.stage.init(key, start, teacher, first)
    for batch in _batches(train, learner.epochs, seed):
        state, _ = learner.stage.update(state, teacher, batch)
    return hj.student_variables(state)


def _accuracy(setting: Setting, network: hj.Network, variables: hj.Variables) -> float:
    """The fraction of test images with the right class."""
    found = setting.classes(network.apply, variables, setting.test.image)
    return float(np.mean(np.asarray(found) == setting.test.label))


def _standardized(dataset: Dataset, part: str) -> Images:
    """A split as the networks see it."""
    split = getattr(dataset, part)
    mean, std = dataset.standardize
    image = (np.float32(split.image) / 255 - mean) / std
    return Images(np.float32(image), np.int32(split.label))


def _batches(train: Images, epochs: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Whole batches in a random order."""
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(train.image))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            at = order[start : start + BATCH]
            yield {"image": train.image[at], "label": train.label[at]}


def _gain(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The paired differences between training with the rounding and without."""
    aware, continued = ([run[key] for run in runs] for key in ("aware", "continued"))
    return paired(aware, continued)._asdict()


def table(record: Mapping[str, Any]) -> str:
    """The record as text; accuracies in percent."""
    machine, runs = record["machine"], record["runs"]

    def mean(numbers: Iterable[float]) -> float:
        return 100 * float(np.mean(list(numbers)))

    first, last = (mean(run[key] for run in runs) for key in ("float", "continued"))
    setting = (
        f"{len(runs)} seeds, {record['train']} training and {record['test']} test "
        f"images on {machine['device']} ({machine['processor']}), jax "
        f"{machine['versions']['jax']}; the teacher has {100 * record['teacher']:.1f} %"
    )
    lines = [
        setting,
        "",
        f"{'':8}{'rounded':>9}{'continued':>11}{'aware':>8}{'gain':>7}{'95 %':>16}",
        f"{'float':8}{first:9.1f}{last:11.1f}",
    ]
    for bits, gain in record["gain"].items():
        rounded, continued, aware = (
            mean(run["bits"][bits][key] for run in runs)
            for key in ("rounded", "continued", "aware")
        )
        interval = f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
        lines.append(
            f"{f'{bits} bits':8}{rounded:9.1f}{continued:11.1f}{aware:8.1f}"
            f"{100 * gain['mean']:+7.1f}{interval:>16}"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    add = parser.add_argument
    add("--bits", type=int, nargs="+", default=[8, 4, 2], help="bits of a weight")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--limit", type=int, help="number of training images; by default all")
    add("--teacher-epochs", type=int, default=5, help="epochs of the teacher")
    add("--epochs", type=int, default=8, help="epochs of the student")
    add("--more", type=int, default=4, help="epochs in which it is trained further")
    add("--rate", type=float, default=5e-4, help="learning rate of these epochs")
    options = parser.parse_args(arguments)
    if options.small:
        options.bits, options.limit = [4], 2 * BATCH
        options.teacher_epochs = options.epochs = options.more = 1
    return options


if __name__ == "__main__":
    main()
