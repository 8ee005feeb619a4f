"""Variational information distillation (VID): matching with learned variances."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean

LEAST_VARIANCE = 1e-5


def variational_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape c"],
    *,
    scale: Float[Array, " c"],
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Variational information distillation (VID): negative Gaussian log-likelihood.

    L = mean_i 1/2 ((s_i - t_i)^2 / v_c + log v_c),  v_c = softplus(scale_c) + 1e-5

    where i runs over all features of one example and c is the channel of i. A channel
    of the teacher that the student cannot predict gets a larger variance, and so a
    smaller weight.

    Args:
        student: the mean of the Gaussian, which the guided layer's regressor predicts.
        teacher: the hint layer, of the same shape.
        scale: one trained number for each channel, which determines its variance.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value per example, at least mean_c log(v_c) / 2, which may be negative.

    Convention:
        `.mean()` is the value that RepDistiller weights by 1 (with its default 1e-5).
        It omits the constant log(2 pi) / 2. The code computes softplus as log(1 + exp),
        which overflows for a scale over 88; this function does not overflow.

    >>> student, scale = jnp.array([[1.0, 2.0]]), jnp.full(2, 0.541304)  # variance 1
    >>> variational_loss(student, jnp.zeros((1, 2)), scale=scale)
    Array([1.25...], dtype=float32)

    References:
        Ahn et al.: Variational Information Distillation for Knowledge Transfer, 2019,
        https://arxiv.org/abs/1904.05835
        https://github.com/HobbitLong/RepDistiller (VID.py)
    """
    caller = "variational_loss"
    student, teacher, scale = as_float(caller, student, teacher, scale)
    do = "Put a regressor between them (hintjax.regressors.mlp)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims + 1, "*batch *positions c", student=student)
    if scale.shape != student.shape[-1:]:
        wanted = f"scale to have one entry for each of {student.shape[-1]} channels"
        raise _checks.Refusal(_checks.message(caller, wanted, f"shape {scale.shape}"))
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    variance = jnp.expand_dims(variance_of(scale), range(student.ndim - 1))
    squares = jnp.square(keep(student - teacher, where))
    return masked_mean((squares / variance + jnp.log(variance)) / 2, where, batch_dims)


def variance_of(scale: Float[Array, " c"]) -> Float[Array, " c"]:
    """Returns the variance for a trained number: softplus(scale) + 1e-5."""
    return jax.nn.softplus(scale) + LEAST_VARIANCE
