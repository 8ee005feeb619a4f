"""Teachers that were trained elsewhere: safetensors files with the weights of torch."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import FileRefusal, Refusal, message
from hintjax.data import Standardize
from hintjax.experiments.config import Config
from hintjax.experiments.factories import attribute_of, network
from hintjax.networks import Network, Variables, join, renormalized
from hintjax.processes import told, told_arrays
from hintjax.weights import Names, family, from_torch, read_safetensors

TORCH_NAMES = "torch_names"  # attribute of a module with a map of names of its own
IMAGES = "image_normalization"  # attribute: mean and std of the images of the weights


def recorded(config: Config) -> Config:
    """The config with the SHA-256 of its file of weights, which is recorded or checked.

    Raises:
        Refusal: if the file has another SHA-256 than the config has.
    """
    if config.weights is None:
        return config
    path = Path(config.weights).expanduser()
    found = told(lambda: _sha256(path))
    if config.weights_sha256 not in (None, found):
        wanted = f"{config.weights} with the SHA-256 {config.weights_sha256}"
        do = "Restore the file with which the run started, or start a new run."
        raise Refusal(message("weights", wanted, found, do))
    return dataclasses.replace(config, weights_sha256=found)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        wanted = f"a file {path} that can be read"
        raise FileRefusal(message("weights", wanted, f"{error}")) from None


def pretrained(
    factory: str,
    weights: Path,
    classes: int,
    inputs: jax.Array,
    standardize: Standardize,
) -> tuple[Network, Variables]:
    """The network of a factory, with the weights of a file.

    The map of names is the map of `hintjax.weights` that fits the file best, or the
    attribute `torch_names` of the module. If the module has the attribute
    `image_normalization`, the network converts the images of the dataset to it.

    Args:
        factory: factory of the network, as package.module:factory.
        weights: safetensors file with the weights.
        classes: number of classes of the dataset. The network has the number of
            classes of the file.
        inputs: one image, which gives the shapes.
        standardize: mean and standard deviation of the images of the dataset.

    Raises:
        Refusal: if the file and the network do not match one to one.
    """
    own = attribute_of(factory, classes, TORCH_NAMES, None)
    wanted = attribute_of(factory, classes, IMAGES, None)

    def made(classes: int) -> Network:
        plain = network(factory, classes)
        return plain if wanted is None else renormalized(plain, standardize, wanted)

    shapes = [_shapes(made(n), inputs) for n in (classes, classes + 1)]
    read: list[np.ndarray] = []

    def trained() -> int:
        tensors = read_safetensors(weights)
        names = own or family(tensors, shapes[0])
        known = _classes(tensors, names, *shapes) or classes
        variables = from_torch(tensors, names, _shapes(made(known), inputs))
        read.extend(map(np.asarray, jax.tree.leaves(variables)))
        return known

    found = made(told(trained))  # process 0 reads, and the others are told
    leaves, structure = jax.tree.flatten(_shapes(found, inputs))
    arrays = told_arrays(read, [(leaf.shape, leaf.dtype) for leaf in leaves])
    return found, jax.tree.unflatten(structure, map(jnp.asarray, arrays))


def _shapes(made: Network, inputs: jax.Array) -> Variables:
    """The variables of a network, as shapes."""
    return jax.eval_shape(made.init, jax.random.key(0), inputs)


def _classes(
    tensors: Mapping[str, np.ndarray], names: Names, few: Variables, more: Variables
) -> int | None:
    """The number of classes of a file; None if the network has no head.

    The head is the leaf that grows with the number of classes, from `few` to `more`.
    """
    pairs = zip(*(jax.tree.leaves_with_path(join(v)) for v in (few, more)), strict=True)
    for (keys, leaf), (_, larger) in pairs:
        rule = names.find(jax.tree_util.keystr(keys, simple=True, separator="/"))
        if rule is None or leaf.shape == larger.shape:
            continue
        wanted = [rule.how.shapes(*one.shape) for one in (leaf, larger)]
        for name, shape, other in zip(rule.torch, *wanted, strict=True):
            axes = np.flatnonzero(np.not_equal(shape, other))
            if name in tensors and tensors[name].ndim == len(shape) and axes.size:
                return tensors[name].shape[axes[0]]
    return None
