"""The standardization of a teacher's features, estimated before training."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.data import order
from hintjax.experiments import recipes
from hintjax.experiments.attachment import as_map, last_stage
from hintjax.experiments.feature_maps import Shown, image_batches
from hintjax.experiments.recipes import Recipe, With
from hintjax.experiments.setting import Setting, taught_by
from hintjax.losses import (
    FeatureMoments,
    Standardization,
    feature_moments,
    merge_moments,
    phi_standardization,
)
from hintjax.networks import Variables, Wants
from hintjax.processes import told_arrays

_ROUNDING = 16 * np.finfo(np.float32).eps  # relative error of a mean of features
_EXAMPLES = 1024  # images, at most, of which each position counts


def with_standardizations(
    setting: Setting, planned: Sequence[Recipe], teacher: Variables
) -> Setting:
    """The setting with PHI-S of the hint layers, if one of the recipes needs it.

    A run that resumes reads the transform from its checkpoint.

    Args:
        setting: setting of the runs.
        planned: recipes of the runs.
        teacher: variables of the teacher.

    Raises:
        Refusal: if the features of a hint layer do not vary.
    """
    own = [recipe if isinstance(recipe, With) else With(recipe) for recipe in planned]
    pairs = [
        pair
        for one in own
        if one.recipe == recipes.PHI_S
        for pair in last_stage(one.places(setting.places))
    ]
    hints = dict.fromkeys(hint for _, hint in pairs)
    if not hints:
        return setting
    found = {hint: _estimated(setting, hint, teacher) for hint in hints}
    places = setting.places._replace(standardizations=found)
    return setting._replace(places=places)


def _estimated(setting: Setting, hint: str, teacher: Variables) -> Standardization:
    """The transform of a layer, of random training images, alike in all processes."""
    train = setting.dataset.train
    index = np.asarray(order(jax.random.key(0), train.n))[:_EXAMPLES]
    features = jax.jit(_layer(setting, hint))
    moments = functools.reduce(
        merge_moments,
        (
            feature_moments(features(teacher, images)[:n])
            for images, n in image_batches(setting, train, index)
        ),
    )
    check_varies(hint, moments)
    leaves = [np.asarray(leaf) for leaf in phi_standardization(moments)]
    kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
    return Standardization(*map(jnp.asarray, told_arrays(leaves, kinds)))


def check_varies(hint: str, moments: FeatureMoments) -> None:
    """Raises if features are constant up to rounding: a scale would enlarge noise.

    Args:
        hint: path of the layer.
        moments: moments of its features.
    """
    variance = jnp.trace(moments.scatter) / jnp.maximum(moments.count - 1, 1)
    deviation = float(jnp.sqrt(variance / moments.mean.shape[0]))
    size = float(jnp.max(jnp.abs(moments.mean)))
    if deviation > _ROUNDING * size:
        return
    wanted = f"features of the teacher's layer {hint} that vary between images"
    got = f"a deviation of {deviation:.3g} around {size:.3g}"
    do = "Train the teacher longer, or name another layer by --pairs."
    raise Refusal(message("phi_s", wanted, got, do))


def _layer(setting: Setting, hint: str) -> Shown:
    """Makes the function that computes a layer of the teacher, tokens as a map."""

    def shown(variables: Variables, images: jax.Array | np.ndarray) -> jax.Array:
        wants = Wants(hints=(hint,))
        network = taught_by(setting)
        features, _ = network.apply(*variables, images, wants=wants, train=False)
        return as_map(features.hints[hint], setting.places.class_tokens[1])

    return shown
