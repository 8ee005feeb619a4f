"""The part of a hint's variance that the guided layer explains (R^2)."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array

from hintjax.data import Dataset, Records, Split, order, take
from hintjax.experiments.attachment import middle
from hintjax.experiments.setting import Setting, taught_by
from hintjax.networks import Network, Variables, Wants
from hintjax.pairing import linearly_explained
from hintjax.regressors import to_grid

_EXAMPLES = 256  # to fit R^2, and as many to judge it


def explained_by(setting: Setting, teacher: Variables) -> Callable[[Variables], float]:
    """Makes the function that computes R^2 of the hint for a student's variables.

    The linear map is fitted on training images and judged on test images.
    """
    guided, hint = middle(setting.places)[-1]
    ours, theirs = setting.places.class_tokens
    shown = {
        "student": jax.jit(map_of(setting.student, guided, ours)),
        "teacher": jax.jit(map_of(taught_by(setting), hint, theirs)),
    }
    dataset = setting.dataset
    fit_on, judge_on = (
        images_of(split, order(jax.random.key(0), split.n)[:_EXAMPLES], dataset)
        for split in (dataset.train, dataset.test)
    )
    theirs = [shown["teacher"](teacher, images) for images in (fit_on, judge_on)]

    def r2(student: Variables) -> float:
        ours = [shown["student"](student, images) for images in (fit_on, judge_on)]
        return float(linearly_explained(*zip(ours, theirs, strict=True)))

    return r2


def images_of(
    split: Split | Records, index: Array | np.ndarray, dataset: Dataset
) -> Array | np.ndarray:
    """Standardized images of a split, decoded or on disk."""
    chosen = split.read(np.asarray(index))
    return take(chosen, np.arange(chosen.n), dataset.standardize)["image"]


def map_of(
    network: Network, path: str, class_tokens: int
) -> Callable[[Variables, Array | np.ndarray], Array]:
    """Makes the function that computes a layer's map; tokens are put on their grid."""

    def shown(variables: Variables, images: Array | np.ndarray) -> Array:
        wants = Wants(hints=(path,))
        features, _ = network.apply(*variables, images, wants=wants, train=False)
        hint = features.hints[path]
        return hint if hint.ndim == 4 else to_grid(hint, drop=class_tokens)

    return shown
