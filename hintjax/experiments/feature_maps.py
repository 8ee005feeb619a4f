"""The maps of one layer of a network, for images of a split."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hintjax.data import Dataset, Source, take
from hintjax.experiments.finished import evaluation_size
from hintjax.experiments.setting import Setting
from hintjax.networks import Network, Variables, Wants
from hintjax.regressors import to_grid

Shown = Callable[[Variables, Array | np.ndarray], Array]  # made by `map_of`


class Images(NamedTuple):
    """A batch of standardized images; the images after the first `n` are repeats."""

    image: Array | np.ndarray
    n: int


def image_batches(
    setting: Setting, split: Source, index: Array | np.ndarray
) -> Iterator[Images]:
    """The images at these positions, in batches of one size for evaluation."""
    index = np.asarray(index)
    size = min(evaluation_size(split, setting.config), len(index))
    for start in range(0, len(index), size):
        part = index[start : start + size]
        filled = np.pad(part, (0, size - len(part)), mode="edge")
        yield Images(images_of(split, filled, setting.dataset), len(part))


def maps(shown: Shown, variables: Variables, batches: Iterable[Images]) -> Array:
    """The maps of all images in the batches."""
    found = [shown(variables, image)[:n] for image, n in batches]
    return found[0] if len(found) == 1 else jnp.concatenate(found)


def images_of(
    split: Source, index: Array | np.ndarray, dataset: Dataset
) -> Array | np.ndarray:
    """Standardized images of a split, decoded or on disk."""
    chosen = split.read(np.asarray(index))
    return take(chosen, np.arange(chosen.n), dataset.standardize)["image"]


def map_of(network: Network, path: str, class_tokens: int) -> Shown:
    """Makes the function that computes a layer's map; tokens are put on their grid."""

    def shown(variables: Variables, images: Array | np.ndarray) -> Array:
        wants = Wants(hints=(path,))
        features, _ = network.apply(*variables, images, wants=wants, train=False)
        hint = features.hints[path]
        return hint if hint.ndim == 4 else to_grid(hint, drop=class_tokens)

    return shown
