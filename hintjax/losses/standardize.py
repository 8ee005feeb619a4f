"""Logit standardization: removes the mean and the scale of logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, deviations, keep, norm

EPS = 1e-7  # as published


def standardize_logits(
    logits: Float[Array, "*batch classes"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch classes"]:
    """Logit standardization: gives each example's logits mean 0 and deviation 1.

    z'_c = (z_c - mean z) / (std z + e),  std with divisor C - 1, e = 1e-7

    Use it before a loss of logits: `kd_loss(standardize_logits(student),
    standardize_logits(teacher), temperature=2.0)`. The student then need not match the
    size of the teacher's logits, only their relations.

    Args:
        logits: finite logits of each class, (batch, *positions, classes).
        where: mask of the examples or positions that count, over the first axes.

    Returns:
        The standardized logits; 0 where masked. Constant logits become 0. Logits with a
        deviation of at most e have no gradient (in the code a gradient of 1e7).

    Convention:
        The unbiased deviation, as in the authors' code.

    >>> standardize_logits(jnp.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    Array([[-1.,  0.,  1.],
           [ 0.,  0.,  0.]], dtype=float32)

    References:
        Sun et al.: Logit Standardization in Knowledge Distillation, 2024.
        https://arxiv.org/abs/2403.01427
        https://github.com/sunshangquan/logit-standardization-KD (KD.py)
    """
    logits = as_float("standardize_logits", logits)
    _checks.rank("standardize_logits", 1, "*batch classes", logits=logits)
    shapes = (logits.shape[:n] for n in range(logits.ndim))
    _checks.mask("standardize_logits", where, *shapes)
    centered = deviations(keep(logits, where))
    freedom = max(logits.shape[-1] - 1, 1)
    deviation = norm(centered)[..., None] / math.sqrt(freedom)
    standard = centered / (deviation + EPS)
    return jnp.where(deviation <= EPS, jax.lax.stop_gradient(standard), standard)
