"""Regressors: small modules that are trained beside the student."""

from hintjax._numerics import bilinear_resize, nearest_resize
from hintjax.regressors.grids import to_grid, to_tokens
from hintjax.regressors.modules import (
    ABF,
    Bottleneck,
    Coder,
    Embedding,
    Generator,
    Regressor,
    Resampled,
    Resized,
    Shape,
    Sizing,
    apply,
    init,
)
from hintjax.regressors.sizing import (
    bottleneck,
    conv,
    fit,
    identity,
    layer_norm_mlp,
    linear,
    mlp,
    resampled,
    valid_conv,
)

__all__ = [
    "ABF",
    "Bottleneck",
    "Coder",
    "Embedding",
    "Generator",
    "Regressor",
    "Resampled",
    "Resized",
    "Shape",
    "Sizing",
    "apply",
    "bilinear_resize",
    "bottleneck",
    "conv",
    "fit",
    "identity",
    "init",
    "layer_norm_mlp",
    "linear",
    "mlp",
    "nearest_resize",
    "resampled",
    "to_grid",
    "to_tokens",
    "valid_conv",
]
