"""The part of a hint's variance that the guided layer explains (R^2)."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hintjax.data import Dataset, Source, order, take
from hintjax.experiments.attachment import middle
from hintjax.experiments.finished import evaluation_size
from hintjax.experiments.setting import Setting, taught_by
from hintjax.networks import Network, Variables, Wants
from hintjax.pairing import linearly_explained
from hintjax.regressors import to_grid

_EXAMPLES = 256  # to fit R^2, and as many to judge it, at most
_POSITIONS = _EXAMPLES * 32 * 32  # of the maps of these examples, at most


def explained_by(
    setting: Setting, teacher: Variables, positions: int = _POSITIONS
) -> Callable[[Variables], float]:
    """Makes the function that computes R^2 of the hint for a student's variables.

    The linear map is fitted on training images and judged on test images.

    Args:
        setting: setting of the runs.
        teacher: variables of the teacher.
        positions: number of positions of the maps to fit, at most, and as many to
            judge.
    """
    guided, hint = middle(setting.places)[-1]
    ours, theirs = setting.places.class_tokens
    dataset = setting.dataset
    student = jax.jit(map_of(setting.student, guided, ours))
    hinted = jax.jit(map_of(taught_by(setting), hint, theirs))
    few = _examples(setting, student, hinted, positions)
    fit_on, judge_on = (
        list(image_batches(setting, split, order(jax.random.key(0), split.n)[:few]))
        for split in (dataset.train, dataset.test)
    )
    theirs = [maps(hinted, teacher, images) for images in (fit_on, judge_on)]

    def r2(variables: Variables) -> float:
        ours = [maps(student, variables, images) for images in (fit_on, judge_on)]
        return float(linearly_explained(*zip(ours, theirs, strict=True)))

    return r2


Shown = Callable[[Variables, Array | np.ndarray], Array]  # made by `map_of`


def _examples(setting: Setting, student: Shown, teacher: Shown, most: int) -> int:
    """The number of examples for R^2: fewer, if their maps are large."""

    def size(network: Network, shown: Shown) -> int:
        key = jax.random.key(0)
        variables = jax.eval_shape(network.init, key, setting.inputs)
        found = jax.eval_shape(shown, variables, setting.inputs)
        return math.prod(found.shape[1:-1])

    # Maps are compared at the smaller of both sizes.
    least = min(size(setting.student, student), size(taught_by(setting), teacher))
    return min(_EXAMPLES, max(1, most // least))


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
