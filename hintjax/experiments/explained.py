"""The part of a hint's variance that the guided layer explains (R^2)."""

import math
from collections.abc import Callable

import jax

from hintjax.data import order
from hintjax.experiments.attachment import middle
from hintjax.experiments.feature_maps import Shown, image_batches, map_of, maps
from hintjax.experiments.setting import Setting, taught_by
from hintjax.networks import Network, Variables
from hintjax.pairing import linearly_explained

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
