"""A student of a pretrained teacher, without labels: hints, KD, and a few labels.

    python benchmarks/foundation.py --weights lite0.safetensors --data-dir DIR \
        --work DIR --out benchmarks/results/foundation.json

Device: any; the default sizes want a GPU or TPU. The committed numbers are from two CPU
cores: all images, but a smaller student, smaller images of the teacher and 7 epochs
instead of 100 (see benchmarks/results/README.md). Hours: not measured at the default
sizes; the script prints an estimate before it trains. Expected: not known at the
default sizes.

EfficientNet-Lite0 with weights of ImageNet teaches resnet20 (0.27M parameters) on
CIFAR-10. All training images are unlabeled but for a few per class. tests/weights says
how to make the file of weights. The teacher runs once on each image, enlarged and
without augmentation; its pooled features are kept in `--work`. The student sees random
crops of the padded images, and flips. The arms have equal numbers of steps:

    scratch     the task, on the few labeled images
    kd          KD on all images; the teacher's classifier is a logistic regression of
                its features on the same few labels
    hints_tune  hints on all images, then the task on the few labeled images
    hints_kd    hints on all images, then KD on all images

Hints are FitNets from pooled features to pooled features, each of the teacher's
standardized over the training images. Hints never see a label, so all numbers of labels
share one hint student per seed. Each seed has its own labeled images, initialization
and order. The first seed tries all `--rates`, and the validation split decides: by
accuracy, or by the hint loss. Training on few images can spoil the hinted layers, so
`hints_tune` also tries `--hinted-rates`, factors for all layers but the classifier. The
split also decides the weight decay of each logistic regression. The validation split
has labels, more than the few; every arm reads it. The test split is read once per
finished run. The frozen features of the teacher, the hint student and an untrained
student are compared by logistic regression and k-NN, both with the few labels.

A finished run (arm, labels, seed) in `--work` is not run again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import hintjax as hj
from hintjax import data, probes, weights
from hintjax.data.images import UNLABELED
from hintjax.data.splits import stratified
from hintjax.experiments.distill import keep_compiled
from hintjax.experiments.statistics import paired
from hintjax.networks import Network, Variables, Wants

Arrays = Mapping[str, np.ndarray]
Run = tuple[str, int, int]  # arm, labels per class, seed
ARMS = ("scratch", "kd", "hints_tune", "hints_kd")
SPLITS = ("train", "validation", "test")
HINTS, FROZEN = "hints", "frozen"
DECAYS = 10.0 ** np.arange(-4, 2)  # weight decays of the logistic regression
HALF = (0.5,), (0.5,)  # mean and std for a teacher that has no normalization


class Known(NamedTuple):
    """The few labels that a run may read.

    Attributes:
        index: positions of the labeled images in the training split.
        label: the labels of all training images; -1 but at those positions.
    """

    index: np.ndarray
    label: np.ndarray


class Rates(NamedTuple):
    """The learning rate, and the factor on it for the layers that the hints trained."""

    rate: float
    hinted: float = 1.0


class Bench(NamedTuple):
    """What all runs share: images, features of the teacher, the student."""

    options: argparse.Namespace
    splits: dict[str, data.Split]
    standardize: data.Standardize
    classes: int
    features: dict[str, np.ndarray]
    student: Network


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table, and returns the record that `--out` writes."""
    options = _options(arguments)
    machine = measure.machine()
    _same_setting(options)
    keep_compiled(options.work / "compiled")
    bench = prepared(options)
    wanted = [
        (arm, labels, seed)
        for seed in range(options.seeds)
        for arm, labels in [
            (HINTS, 0),
            *((FROZEN, labels) for labels in options.labels),
            *((arm, labels) for labels in options.labels for arm in ARMS),
        ]
    ]
    for left in _estimated(bench, wanted):
        finish(bench, *left)
        if options.out:
            measure.write(options.out, record_of(bench, machine, wanted))
    record = record_of(bench, machine, wanted)
    print(table(record))
    if options.out:
        measure.write(options.out, record)
        plot(record, options.out.with_suffix(".png"))
    return record


# Images and the teacher


def prepared(options: argparse.Namespace) -> Bench:
    """Reads the images and the teacher's features, which are computed once."""
    splits, classes = _images(options)
    student = hj.linen(measure.factory(options.student)(classes=classes))
    features = _kept(options.work / "teacher.npz", partial(taught, options, splits))
    mean, std = features["train"].mean(0), features["train"].std(0)
    features = {name: (rows - mean) / (std + 1e-6) for name, rows in features.items()}
    standardize = data.statistics(splits["train"])
    return Bench(options, splits, standardize, classes, features, student)


def _images(options: argparse.Namespace) -> tuple[dict[str, data.Split], int]:
    """The three splits, and the number of classes."""

    def read() -> Arrays:
        given = data.load(options.dataset, options.data_dir, limit=options.images)
        found = {"classes": np.asarray(given.classes)}
        counts = (None, options.validation_images, options.test_images)
        for name, count in zip(SPLITS, counts, strict=True):
            split = getattr(given, name)
            if count is not None and count < split.n:
                split = split.read(stratified(split.label, count, 0))
            found |= {f"{name}_image": split.image, f"{name}_label": split.label}
        return found

    found = _kept(options.work / "images.npz", read)
    splits = {
        name: data.Split(found[f"{name}_image"], found[f"{name}_label"])
        for name in SPLITS
    }
    return splits, int(found["classes"])


def taught(options: argparse.Namespace, splits: Mapping[str, data.Split]) -> Arrays:
    """The teacher's pooled features of every image; it reads no labels."""
    model = measure.factory(options.teacher)(classes=options.teacher_classes)
    network, side = hj.linen(model), options.teacher_size
    mean, std = map(np.asarray, getattr(model, "image_normalization", HALF))
    shape = (1, side, side, splits["train"].shape[-1])
    like = jnp.zeros(shape, jnp.float32)
    if options.weights:
        variables = jax.eval_shape(network.init, jax.random.key(0), like)
        tensors = weights.read_safetensors(options.weights)
        names = weights.family(tensors, variables)
        variables = weights.from_torch(tensors, names, variables)
    else:
        variables = network.init(jax.random.key(0), like)

    @jax.jit
    def features(variables: Variables, pixels: jax.Array) -> jax.Array:
        image = (pixels / 255 - mean) / std
        image = jax.image.resize(image, (len(image), *shape[1:]), "bicubic")
        wants = Wants(output=False, hints=(options.layer,))
        shown, _ = network.apply(*variables, image, wants=wants, train=False)
        return shown.hints[options.layer]

    count = sum(split.n for split in splits.values())
    start, done, rows = time.perf_counter(), 0, {}
    for name, split in splits.items():
        rows[name] = []
        for pixels, valid in batches_of(split.image, 50):
            rows[name].append(np.asarray(features(variables, pixels))[:valid])
            done += valid
            if done == 250:
                minutes = (time.perf_counter() - start) / 60 / done * count
                print(f"teacher: about {minutes:.0f} minutes", flush=True)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def batches_of(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, in order, and how many of their images are no repeats."""
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        valid = len(batch)
        yield np.concatenate([batch, *[batch[-1:]] * (size - valid)]), valid


def _kept(path: Path, compute: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """The arrays of a file, which is computed and written if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **compute())
        part.rename(path)
    with np.load(path) as file:
        return dict(file)


# Training


def known(bench: Bench, labels: int, seed: int) -> Known:
    """The labels of `labels` images per class, by its share; all others are hidden."""
    true = bench.splits["train"].label
    index = chosen(true, labels * bench.classes, seed)
    label = np.full(true.shape, UNLABELED, np.int32)
    label[index] = true[index]
    return Known(index, label)


# Which images have labels; it alone reads the labels of all training images.
chosen = stratified


def trained(
    bench: Bench,
    stage: hj.Stage,
    start: Variables,
    few: Known,
    rows: np.ndarray,
    logits: np.ndarray,
    steps: int,
    seed: int,
) -> tuple[hj.State, float]:
    """Trains for a number of steps on these images; the state, and seconds per step."""
    options = bench.options
    placed = data.place(bench.splits["train"]._replace(label=few.label))
    index = _orders(rows, options.batch, np.random.default_rng(seed))
    key, began = jax.random.key(seed), 0.0
    state = None
    for step in range(steps):
        at = next(index)
        batch = _batch(
            placed,
            at,
            bench.standardize,
            jax.random.fold_in(key, step),
            options.augment,
        )
        batch["taught"] = _taught(bench, "train", at, logits)
        if state is None:
            state = stage.init(key, start, NOTHING, batch)
        state, metrics = stage.update(state, NOTHING, batch)
        if step == 0:
            jax.block_until_ready(metrics)
            began = time.perf_counter()
    jax.block_until_ready(state.step)
    return state, (time.perf_counter() - began) / max(steps - 1, 1)


def _orders(
    rows: np.ndarray, size: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of rows without end, in a new order when all rows are used up."""
    waiting = rows[:0]
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, random.permutation(rows)])
        yield waiting[:size].astype(np.int32)
        waiting = waiting[size:]


@partial(jax.jit, static_argnums=4)
def _batch(
    placed: data.Placed,
    index: jax.Array,
    standardize: data.Standardize,
    key: jax.Array,
    augment: data.Augment,
) -> dict[str, jax.Array]:
    return data.take(placed, index, standardize, key=key, augment=augment)


# The teacher as the stages see it: its features and logits are in the batch.


def _stored(params: Any, state: Any, inputs: Arrays, train: bool, key: Any) -> Any:
    return inputs["logits"], {"features": inputs["features"]}, state


STORED, NOTHING = hj.function(_stored), Variables({}, {})


def _taught(bench: Bench, split: str, at: np.ndarray, logits: np.ndarray) -> Arrays:
    return {"features": bench.features[split][at], "logits": logits[at]}


def _read_taught(batch: Mapping[str, Any]) -> Any:
    return batch["taught"]


def stage_of(bench: Bench, kind: str, rates: Rates, steps: int) -> hj.Stage:
    """The stage of "hints", "kd" or "task", with its optimizer."""
    options, student = bench.options, bench.student
    peak = rates.rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 20 + 1, steps + 1)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    if kind == "task":
        loss = optax.softmax_cross_entropy_with_integer_labels
        method = hj.objective(task=hj.weighted(hj.task(loss), 1.0))
        hinted = {options.layer: rates.hinted}
        return hj.distillation_stage(student, None, method, optimizer, rates=hinted)
    if kind == "kd":
        method = hj.objective(kd=hj.weighted(hj.kd(options.temperature), 1.0))
        make = hj.distillation_stage
    else:
        pairs = [(options.layer, "features")]
        method = hj.objective(hints=hj.weighted(hj.fitnets(pairs), 1.0))
        make = hj.hint_stage
    return make(student, STORED, method, optimizer, teacher_inputs=_read_taught)


# Runs


def finish(bench: Bench, arm: str, labels: int, seed: int) -> None:
    """Runs an arm unless its file is there, and writes the file."""
    path = path_of(bench, arm, labels, seed)
    if path.exists():
        return
    start = time.perf_counter()
    if arm == FROZEN:
        found = frozen(bench, labels, seed)
    else:
        found = _best(bench, arm, labels, seed)
    found["seconds"] = time.perf_counter() - start
    print(path.stem, json.dumps(found), flush=True)
    measure.write(path, found)


def path_of(bench: Bench, arm: str, labels: int, seed: int) -> Path:
    """The file of a finished run."""
    return bench.options.work / "runs" / f"{arm}_{labels}_{seed}.json"


def _best(bench: Bench, arm: str, labels: int, seed: int) -> dict[str, Any]:
    """The run with the rates that the validation split chooses, with the first seed."""
    several = _rates(bench.options, arm)
    if seed:
        first = json.loads(path_of(bench, arm, labels, 0).read_text())
        several = [Rates(first["rate"], first["hinted_rate"])]
    tried = {rates: _run(bench, arm, labels, seed, rates) for rates in several}
    values = {rates: value for rates, (value, _) in tried.items()}
    pick = min if arm == HINTS else max
    best = pick(values, key=values.get)
    variables = tried[best][1]
    found = {
        "rate": best.rate,
        "hinted_rate": best.hinted,
        "validation": {f"{r.rate:g} x {r.hinted:g}": v for r, v in values.items()},
    }
    if arm == HINTS:
        leaves = map(np.asarray, jax.tree.leaves(variables))
        path = path_of(bench, arm, labels, seed).with_suffix(".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *leaves)
        return found
    return found | {"test": accuracy(bench, variables, "test")}


def _rates(options: argparse.Namespace, arm: str) -> list[Rates]:
    """The rates that the first seed of an arm tries."""
    hinted = options.hinted_rates if arm == "hints_tune" else [1.0]
    return [Rates(*both) for both in product(options.rates, hinted)]


def _run(
    bench: Bench, arm: str, labels: int, seed: int, rates: Rates
) -> tuple[float, Variables]:
    """Trains one arm; its value on the validation split, and the variables."""
    n = bench.splits["train"].n
    every, steps = np.arange(n), steps_of(bench, arm)
    if arm == HINTS:
        none = Known(every[:0], np.full(n, UNLABELED, np.int32))
        stage = stage_of(bench, HINTS, rates, steps)
        start = untrained(bench, seed)
        state, _ = trained(
            bench, stage, start, none, every, no_logits(bench, none), steps, seed
        )
        return hint_loss(bench, stage, state), hj.student_variables(state)
    few, by_hints = known(bench, labels, seed), arm.startswith(HINTS)
    by_kd = arm.endswith("kd")
    start = hinted(bench, seed) if by_hints else untrained(bench, seed)
    rows = every if by_kd else few.index
    stage = stage_of(bench, "kd" if by_kd else "task", rates, steps)
    logits = (teacher_logits if by_kd else no_logits)(bench, few)
    state, _ = trained(bench, stage, start, few, rows, logits, steps, seed)
    variables = hj.student_variables(state)
    return accuracy(bench, variables, "validation"), variables


def steps_of(bench: Bench, arm: str) -> int:
    """The number of steps of a run; hints and what follows have those of other arms."""
    each = bench.splits["train"].n // bench.options.batch
    first, second = each * bench.options.hint_epochs, each * bench.options.epochs
    parts = {HINTS: first, "hints_tune": second, "hints_kd": second, FROZEN: 0}
    return parts.get(arm, first + second)


def untrained(bench: Bench, seed: int) -> Variables:
    """The student of a seed before training."""
    image = jnp.zeros((1, *bench.splits["train"].shape), jnp.float32)
    return jax.jit(bench.student.init)(jax.random.key(1000 + seed), image)


def hinted(bench: Bench, seed: int) -> Variables:
    """The student of a seed after the hint stage, from its file."""
    like = untrained(bench, seed)
    with np.load(path_of(bench, HINTS, 0, seed).with_suffix(".npz")) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# Evaluation


def accuracy(bench: Bench, variables: Variables, split: str) -> float:
    """The part of the images that the student classifies rightly."""
    output, _ = shown(bench, variables, split)
    return float(np.mean(output.argmax(-1) == bench.splits[split].label))


def shown(
    bench: Bench, variables: Variables, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """The logits and features that the student computes for a split."""
    layer, rows = bench.options.layer, []

    @jax.jit
    def show(variables: Variables, image: jax.Array) -> Any:
        wants = Wants(output=True, hints=(layer,))
        found, _ = bench.student.apply(*variables, image, wants=wants, train=False)
        return found.output, found.hints[layer]

    for batch in data.evaluation_batches(bench.splits[split], 250, bench.standardize):
        found = show(variables, batch["image"])
        rows.append([np.asarray(one)[batch["where"]] for one in found])
    output, features = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return output, features


def hint_loss(bench: Bench, stage: hj.Stage, state: hj.State) -> float:
    """The hint loss on the validation split, which needs no label."""
    split = bench.splits["validation"]
    blank, total = np.zeros((split.n, bench.classes), np.float32), 0.0
    for batch in data.evaluation_batches(split, bench.options.batch, bench.standardize):
        taught = _taught(bench, "validation", np.asarray(batch["index"]), blank)
        metrics = stage.evaluate(state, NOTHING, batch | {"taught": taught})
        total += float(metrics["loss"]) * float(batch["where"].sum())
    return total / split.n


def frozen(bench: Bench, labels: int, seed: int) -> dict[str, Any]:
    """Test accuracy of frozen features with few labels: logistic regression, k-NN."""
    few = known(bench, labels, seed)
    networks = {"untrained": untrained(bench, seed), HINTS: hinted(bench, seed)}
    features = {
        name: {split: shown(bench, one, split)[1] for split in SPLITS}
        for name, one in networks.items()
    }
    found = {}
    for name, rows in (features | {"teacher": bench.features}).items():
        probe = logistic(bench, rows, few)
        near = probes.knn_scores(
            jnp.asarray(rows["test"]),
            jnp.asarray(rows["train"][few.index]),
            jnp.asarray(few.label[few.index]),
            classes=bench.classes,
            k=min(20, len(few.index)),
        )
        right = bench.splits["test"].label
        found[name] = {
            "probe": float(np.mean(probe(rows["test"]).argmax(-1) == right)),
            "knn": float(np.mean(np.argmax(near, -1) == right)),
        }
    return found


def teacher_logits(bench: Bench, few: Known) -> np.ndarray:
    """The teacher's logits of all training images: a probe on the few labels."""
    return logistic(bench, bench.features, few)(bench.features["train"])


def no_logits(bench: Bench, few: Known) -> np.ndarray:
    """Zeros in place of the teacher's logits, for stages that do not read them."""
    return np.zeros((len(few.label), bench.classes), np.float32)


def logistic(
    bench: Bench, features: Arrays, few: Known
) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression of features on the few labels.

    The features are standardized over all training images. The weight decay has the
    smallest loss on the validation split.
    """
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6

    def scaled(rows: np.ndarray) -> np.ndarray:
        return (rows - mean) / std

    rows, label = scaled(features["train"][few.index]), few.label[few.index]
    right = bench.splits["validation"].label
    best, lowest = None, np.inf
    for decay in DECAYS:
        weight, bias = map(np.asarray, _regressed(rows, label, decay, bench.classes))
        scores = scaled(features["validation"]) @ weight + bias
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, right).mean()
        if best is None or loss < lowest:
            best, lowest = (weight, bias), loss
    weight, bias = best
    return lambda rows: scaled(rows) @ weight + bias


@partial(jax.jit, static_argnums=3)
def _regressed(
    rows: jax.Array, label: jax.Array, decay: float, classes: int
) -> tuple[jax.Array, jax.Array]:
    """Weight and bias of least cross-entropy + decay / 2 |weight|^2, by 200 steps."""
    adam = optax.adam(optax.cosine_decay_schedule(0.02, 200))

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores = rows @ params[0] + params[1]
        errors = optax.softmax_cross_entropy_with_integer_labels(scores, label)
        return errors.mean() + decay / 2 * (params[0] ** 2).sum()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros((rows.shape[1], classes)), jnp.zeros(classes)
    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=200)
    return params


# Order of the runs, record and table


def _estimated(bench: Bench, wanted: Sequence[Run]) -> Iterator[Run]:
    """The runs that are not finished, after an estimate of their time."""
    left = [run for run in wanted if not path_of(bench, *run).exists()]
    if not left:
        return
    total = sum(
        steps_of(bench, arm) * (1 if seed else len(_rates(bench.options, arm)))
        for arm, _, seed in left
    )
    few = known(bench, bench.options.labels[0], 0)
    stage, start = stage_of(bench, "task", Rates(1e-3), 10), untrained(bench, 0)
    blank = no_logits(bench, few)
    _, seconds = trained(bench, stage, start, few, few.index, blank, 10, 0)
    minutes = total * seconds / 60
    print(f"{len(left)} runs, {total} steps: about {minutes:.0f} minutes", flush=True)
    yield from left


def record_of(
    bench: Bench, machine: Mapping[str, Any], wanted: Sequence[Run]
) -> dict[str, Any]:
    """All finished runs, by arm and number of labels per class."""
    options, runs, left = bench.options, {}, []
    for arm, labels, seed in wanted:
        path = path_of(bench, arm, labels, seed)
        if path.exists():
            place = runs.setdefault(arm, {}).setdefault(str(labels), {})
            place[str(seed)] = json.loads(path.read_text())
        else:
            left.append(path.stem)
    student = untrained(bench, 0).params
    return {
        "benchmark": "foundation",
        "machine": machine,
        "images": {name: split.n for name, split in bench.splits.items()},
        "student_parameters": sum(leaf.size for leaf in jax.tree.leaves(student)),
        "options": _plain(options),
        "unfinished": left,
        "runs": runs,
        "differences": differences(runs),
    }


def differences(runs: Mapping[str, Any]) -> dict[str, Any]:
    """For two arms "a - b" and labels per class, the paired differences of seeds."""
    found = {}
    for a, b in combinations([arm for arm in reversed(ARMS) if arm in runs], 2):
        for labels, ours in runs[a].items():
            others = runs[b].get(labels, {})
            seeds = [seed for seed in ours if seed in others]
            tests = ([run[seed]["test"] for seed in seeds] for run in (ours, others))
            if len(seeds) > 1:
                pair = paired(*tests)._asdict()
                found.setdefault(f"{a} - {b}", {})[labels] = pair
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as text: test accuracy in percent, the mean of the seeds."""
    machine, runs = record["machine"], record["runs"]
    student = f"student of {record['student_parameters']} parameters"
    lines = [
        f"{record['images']} images, {student} on {machine['device']}",
        f"{'arm':24}{'labels per class':>18}{'test':>8}  seeds",
    ]
    for name, labels, values in _rows(runs):
        each = " ".join(f"{value:.1f}" for value in values)
        mean = sum(values) / len(values)
        lines.append(f"{name:24}{labels:>18}{mean:8.1f}  {each}")
    for pair, counts in record["differences"].items():
        for labels, one in counts.items():
            mean, low, high = (100 * one[name] for name in ("mean", "low", "high"))
            lines.append(
                f"{pair:24}{labels:>18}{mean:+8.1f}  [{low:+.1f}, {high:+.1f}]"
            )
    if record["unfinished"]:
        lines.append(f"not finished: {', '.join(record['unfinished'])}")
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draws test accuracy over the labels per class: means, and a dot for each seed."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, list[float]]] = {}
    for name, labels, values in _rows(record["runs"]):
        lines.setdefault(name, {})[labels] = values
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        if name.endswith("knn"):
            continue
        means = [sum(values) / len(values) for values in line.values()]
        style = "-" if name in ARMS else "--"
        (drawn,) = axes.plot(list(line), means, style, label=name)
        for labels, values in line.items():
            axes.plot([labels] * len(values), values, ".", color=drawn.get_color())
    counts = record["options"]["labels"]
    axes.set_xscale("log")
    axes.set_xticks(counts, counts)
    axes.set_xlabel("labels per class")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _rows(runs: Mapping[str, Any]) -> Iterator[tuple[str, int, list[float]]]:
    """Name, labels per class, and the accuracies of all seeds in percent."""
    for arm in (*ARMS, FROZEN):
        for labels, seeds in runs.get(arm, {}).items():
            for name, values in _accuracies(arm, seeds.values()).items():
                yield name, int(labels), [100 * value for value in values]


def _accuracies(arm: str, runs: Iterable[Any]) -> dict[str, list[float]]:
    """The accuracies of the seeds, by the names of the rows of the table."""
    if arm != FROZEN:
        return {arm: [run["test"] for run in runs]}
    runs = list(runs)
    return {
        f"{network} {kind}": [run[network][kind] for run in runs]
        for network in ("untrained", HINTS, "teacher")
        for kind in ("probe", "knn")
    }


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the numbers, as JSON holds them."""
    left_out = ("work", "out", "seeds", "small", "augment", "weights", "data_dir")
    kept = {name: v for name, v in vars(options).items() if name not in left_out}
    return kept | {"weights": "published" if options.weights else "random"}


def _same_setting(options: argparse.Namespace) -> None:
    """Refuses a folder whose finished runs have other options."""
    path, own = options.work / "options.json", _plain(options)
    if path.exists() and json.loads(path.read_text()) != own:
        raise SystemExit(f"{path} has other options. Give another --work.")
    measure.write(path, own)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = measure.parser(__doc__)
    measure.add_runs(parser, dataset="cifar10", seeds=3)
    add = parser.add_argument
    add(
        "--weights",
        type=Path,
        default=os.environ.get("HINTJAX_EFFICIENTNET_LITE0"),
        help="safetensors file of the teacher",
    )
    add("--teacher", default="hintjax.models:efficientnet_lite0", help="its factory")
    add("--teacher-classes", type=int, default=1000, help="logits in the file")
    add("--teacher-size", type=int, default=128, help="pixels of its images")
    add("--student", default="hintjax.models:resnet20", help="package.module:factory")
    add("--layer", default="pool", help="the pooled features, of both networks")
    add("--images", type=int, help="training images; by default all")
    add("--validation-images", type=int, default=5000, help="images that choose rates")
    add("--test-images", type=int, default=10000, help="images of the test split")
    add("--labels", type=int, nargs="+", default=[10, 100], help="labels per class")
    add("--hint-epochs", type=int, default=50, help="epochs of the hint stage")
    add("--epochs", type=int, default=50, help="epochs after it, of all images")
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates")
    add(
        "--hinted-rates",
        type=float,
        nargs="+",
        default=[1.0, 0.1],
        help="factors on the rate of hinted layers, when the task follows the hints",
    )
    add("--temperature", type=float, default=1.0, help="temperature of KD")
    add("--pad", type=int, default=4, help="pixels of padding before a crop")
    options = parser.parse_args(arguments)
    if options.small:
        options.dataset, options.weights, options.teacher_size = "digits", None, 8
        options.teacher = options.student = "hintjax.models:plain_wide"
        options.teacher_classes, options.images, options.pad = 10, 64, 1
        options.validation_images = options.test_images = 40
        options.labels, options.hint_epochs, options.epochs = [2], 1, 1
        options.batch, options.rates, options.seeds = 16, [1e-3], 1
    elif not options.weights:
        parser.error("--weights is needed: tests/weights/test_teachers.py makes it.")
    flip = options.dataset != "digits"
    options.augment = data.Augment(pad=options.pad, flip=flip)
    return options


if __name__ == "__main__":
    main()
