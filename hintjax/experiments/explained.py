"""How much of a hint the guided layer explains (R^2)."""

import jax
import numpy as np

from hintjax.data import order, take
from hintjax.experiments.attachment import middle
from hintjax.networks import Wants
from hintjax.pairing import linearly_explained
from hintjax.regressors import to_grid

_EXAMPLES = 256  # that R^2 is fitted and judged on


def explained_by(setting, teacher):
    """(student's variables) -> R^2 of the hint, from training to test images."""
    guided, hint = middle(setting.places)[-1]
    ours, theirs = setting.places.class_tokens
    shown = {
        "student": jax.jit(map_of(setting.student, guided, ours)),
        "teacher": jax.jit(map_of(setting.teacher, hint, theirs)),
    }
    dataset = setting.dataset
    fit_on, judge_on = (
        images_of(split, order(jax.random.key(0), split.n)[:_EXAMPLES], dataset)
        for split in (dataset.train, dataset.test)
    )
    theirs = [shown["teacher"](teacher, images) for images in (fit_on, judge_on)]

    def r2(student):
        ours = [shown["student"](student, images) for images in (fit_on, judge_on)]
        return float(linearly_explained(*zip(ours, theirs, strict=True)))

    return r2


def images_of(split, index, dataset):
    """Standardised images of a split, decoded or on disk."""
    chosen = split.read(np.asarray(index))
    return take(chosen, np.arange(chosen.n), dataset.standardize)["image"]


def map_of(network, path, class_tokens):
    """A layer's map; that of tokens is their grid."""

    def shown(variables, images):
        wants = Wants(hints=(path,))
        features, _ = network.apply(*variables, images, wants=wants, train=False)
        hint = features.hints[path]
        return hint if hint.ndim == 4 else to_grid(hint, drop=class_tokens)

    return shown
