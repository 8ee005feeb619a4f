"""Channels are cut out of a trained network, and the network that is left is distilled.

    python examples/pruning/prune.py --output runs/pruned

The network that is left is narrower: it has smaller kernels and no masks, so it takes
fewer bytes and less time on any device. It learns from the network that it was cut out
of, by KD and a hint. Minutes on two CPU cores: 1. Expected on the digits of
scikit-learn, with half of the channels of each layer:

    whole                     28,714 parameters, validation  97.9 %, test 99.2 %
    cut by magnitude           7,450 parameters, validation  15.3 %
    cut by taylor              7,450 parameters, validation  44.4 %
    cut by taylor, distilled   7,450 parameters, validation  96.5 %, test 98.6 %
    random, distilled          7,450 parameters, validation  96.5 %

The validation split chooses how channels are ranked. The test split is read once, at
the end. The last row is a network of the same shape that starts from random weights and
is distilled as long: the kept weights are worth nothing more here.

References:
    Magnitude: Li et al. 2017, Pruning Filters for Efficient ConvNets. Taylor: Molchanov
    et al. 2019, Importance Estimation for Neural Network Pruning. Random weights: Liu
    et al. 2019, Rethinking the Value of Network Pruning.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import hintjax as hj
from hintjax import export
from hintjax.data import Dataset, load
from hintjax.models import PlainCNN

WIDTHS = (32, 32, 64)
LAYERS = ("conv1", "conv2", "conv3")  # each reads the channels of the one before
HINT, HINT_WEIGHT = "conv2", 1.0
BATCH = 32
KEY = jax.random.key(0)
TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)

Scores = Mapping[str, np.ndarray]  # one number for each channel of each layer
Images = Mapping[str, Any]  # arrays "image" and "label", one row for each example


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, cuts, distills and exports; returns the numbers that it prints."""
    options = _options(arguments)
    digits = load("digits", limit=options.limit)
    train, epochs = standardized(digits, "train"), options.epochs
    validation = standardized(digits, "validation")
    found = {}

    def show(name: str, network: hj.Network, variables: hj.Variables) -> None:
        size = sum(leaf.size for leaf in jax.tree.leaves(variables.params))
        found[name] = accuracy(network, variables, validation)
        shown = f"{size:7,} parameters, validation {100 * found[name]:5.1f} %"
        print(f"{name:24} {shown}", flush=True)

    whole = hj.linen(network(WIDTHS, digits.classes))
    task = hj.objective(task=TASK)
    stage = hj.distillation_stage(whole, None, task, adam(train, epochs))
    fresh = whole.init(KEY, train["image"][:1])
    variables = learned(stage, fresh, None, train, epochs)
    show("whole", whole, variables)

    # Channels are cut by each score; the validation split chooses the score.
    widths = [max(1, round(options.keep * width)) for width in WIDTHS]
    narrow = hj.linen(network(widths, digits.classes))
    scores = {
        "magnitude": magnitude(variables.params),
        "taylor": taylor(whole, variables, train),
    }
    left = {
        f"cut by {name}": hj.Variables(cut(variables.params, kept(score, widths)), {})
        for name, score in scores.items()
    }
    for name, start in left.items():
        show(name, narrow, start)
    best = max(left, key=lambda name: found[name])

    # The narrow network learns from the network that it was cut out of.
    method = hj.objective(
        task=hj.weighted(TASK, 0.1),
        kd=hj.weighted(hj.kd(temperature=4.0), 0.9),
        hint=hj.weighted(hj.fitnets([(HINT, HINT)]), HINT_WEIGHT),
    )
    stage = hj.distillation_stage(narrow, whole, method, adam(train, epochs))
    random = narrow.init(KEY, train["image"][:1])
    distilled = learned(stage, left[best], variables, train, epochs)
    show(f"{best}, distilled", narrow, distilled)
    show("random, distilled", narrow, learned(stage, random, variables, train, epochs))

    # All choices are made. Now the test split is read.
    test = standardized(digits, "test")
    for name, one in {"whole": (whole, variables), best: (narrow, distilled)}.items():
        found[f"test, {name}"] = accuracy(*one, test)
        print(f"test, {name}: {100 * found[f'test, {name}']:.1f} %")
    if options.output:
        write(options.output, narrow, distilled, digits)
    return found


def network(widths: Sequence[int], classes: int) -> PlainCNN:
    """A plain CNN with He's initialization."""
    he = jax.nn.initializers.he_normal()
    return PlainCNN(tuple(widths), classes, pools=(2,), kernel_init=he)


def magnitude(params: Mapping[str, Any]) -> Scores:
    """The L1 norm of each channel's kernel (Li et al.)."""
    kernels = {layer: np.asarray(params[layer]["conv"]["kernel"]) for layer in LAYERS}
    return {layer: np.abs(kernel).sum((0, 1, 2)) for layer, kernel in kernels.items()}


def taylor(whole: hj.Network, variables: hj.Variables, train: Images) -> Scores:
    """How much the loss would change without a channel, to first order (Molchanov).

    `score = mean over batches of (sum of g w over the channel's parameters)^2`
    """

    @jax.jit
    def squares(params, batch):
        def loss(params):
            logits = output(whole, hj.Variables(params, variables.state), batch)
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, batch["label"]).mean()

        products = jax.tree.map(jnp.multiply, params, jax.grad(loss)(params))
        convs = {layer: products[layer]["conv"] for layer in LAYERS}
        return {
            layer: (conv["kernel"].sum((0, 1, 2)) + conv["bias"]) ** 2
            for layer, conv in convs.items()
        }

    each = [squares(variables.params, batch) for batch in batches(train, 1)]
    return jax.tree.map(lambda *scores: np.mean(scores, 0), *each)


def kept(scores: Scores, widths: Sequence[int]) -> dict[str, np.ndarray]:
    """The channels with the highest scores of each layer, in their order."""
    return {
        layer: np.sort(np.argsort(-scores[layer], kind="stable")[:width])
        for layer, width in zip(LAYERS, widths, strict=True)
    }


def cut(params: Mapping[str, Any], kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of the kept channels.

    A layer loses the channels that it writes and the channels that it would read from
    the layer before. The classifier loses what it would read.
    """
    found = {}
    before = np.arange(params[LAYERS[0]]["conv"]["kernel"].shape[2])
    for layer in LAYERS:
        conv, after = params[layer]["conv"], kept[layer]
        kernel = conv["kernel"][:, :, before][..., after]
        found[layer] = {"conv": {"kernel": kernel, "bias": conv["bias"][after]}}
        before = after
    head = params["classifier"]
    found["classifier"] = {"kernel": head["kernel"][before], "bias": head["bias"]}
    return found


def learned(
    stage: hj.Stage,
    start: hj.Variables,
    teacher: hj.Variables | None,
    train: Images,
    epochs: int,
) -> hj.Variables:
    """The loop: one update for each batch."""
    state = stage.init(KEY, start, teacher, next(batches(train, 1)))
    for batch in batches(train, epochs):
        state, _ = stage.update(state, teacher, batch)
    return hj.student_variables(state)


def adam(train: Images, epochs: int) -> optax.GradientTransformation:
    """Adam, whose learning rate falls along a cosine."""
    steps = epochs * (len(train["label"]) // BATCH)
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


def batches(train: Images, epochs: int) -> Iterator[Images]:
    """Whole batches, in a new order in every epoch."""
    generator = np.random.default_rng(0)
    for _ in range(epochs):
        order = generator.permutation(len(train["label"]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            at = order[start : start + BATCH]
            yield {name: array[at] for name, array in train.items()}


def standardized(digits: Dataset, part: str) -> Images:
    """A split as the networks see it."""
    split = getattr(digits, part)
    mean, std = digits.standardize
    image = (np.float32(split.image) / 255 - mean) / std
    return {"image": jnp.asarray(image), "label": jnp.asarray(split.label)}


def output(
    network: hj.Network, variables: hj.Variables, batch: Images
) -> Float[Array, "batch classes"]:
    """The logits of a batch."""
    wants = hj.Wants(output=True)
    shown, _ = network.apply(*variables, batch["image"], wants=wants, train=False)
    return shown.output


def accuracy(network: hj.Network, variables: hj.Variables, images: Images) -> float:
    """The fraction of images with the right class."""
    classes = output(network, variables, images).argmax(-1)
    return float((classes == images["label"]).mean())


def write(
    folder: Path, network: hj.Network, variables: hj.Variables, digits: Dataset
) -> None:
    """Exports the network in each format whose converter is installed."""
    mean, std = map(np.asarray, digits.standardize)
    height, width, channels = digits.train.shape
    model = export.standalone(
        network,
        variables,
        (height, width, channels),
        mean=mean,
        std=std,
        classes=digits.class_names,
    )
    images = np.asarray(digits.train.image[:256])
    makes = {
        "pruned.stablehlo": lambda: export.stablehlo(model),
        "pruned.tflite": lambda: export.tflite(model),
        "pruned-int8.tflite": lambda: export.tflite_int8(model, images),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makes.items():
        try:
            data = make()
        except export.NoConverter as missing:
            print(f"no {name}: {missing}")
            continue
        (folder / name).write_bytes(data)
        print(f"file: {folder / name}, {len(data):,} bytes")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--keep", type=float, default=0.5, help="fraction of the channels to keep")
    add("--epochs", type=int, default=30, help="epochs of each training")
    add("--limit", type=int, help="number of training images; by default all")
    add("--output", type=Path, help="folder for the exported files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
