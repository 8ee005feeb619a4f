"""Regressors: small modules that are trained beside the student."""

from hintjax.regressors.grids import to_grid, to_tokens
from hintjax.regressors.modules import (
    ABF,
    Bottleneck,
    Coder,
    Embedding,
    Generator,
    Regressor,
    Resampled,
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
    "Shape",
    "Sizing",
    "apply",
    "bottleneck",
    "conv",
    "fit",
    "identity",
    "init",
    "linear",
    "mlp",
    "resampled",
    "to_grid",
    "to_tokens",
    "valid_conv",
]
