"""Logits without their size: logit standardisation."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax import _checks
from hintjax._numerics import as_float, deviations, norm

EPS = 1e-7  # as published


def standardize_logits(
    logits: Float[Array, "*batch classes"],
) -> Float[Array, "*batch classes"]:
    """Logit standardisation: the logits of each example, of mean 0 and deviation 1.

    z'_c = (z_c - mean z) / (std z + e),  std with C - 1, e = 1e-7

    Before a loss of logits, as in `kd_loss(standardize_logits(student),
    standardize_logits(teacher), temperature=2.0)`: the student need not match the size
    of the teacher's logits, only their relations.

    Args:
        logits: finite logits of each class.

    Returns:
        The standardised logits. Logits that do not vary are 0, and of a deviation below
        e they have no gradient (it is 1e7 in the code).

    Convention:
        As the authors' code: the unbiased deviation.

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
    centred = deviations(logits)
    freedom = max(logits.shape[-1] - 1, 1)
    deviation = norm(centred)[..., None] / math.sqrt(freedom)
    standard = centred / (deviation + EPS)
    return jnp.where(deviation <= EPS, jax.lax.stop_gradient(standard), standard)
