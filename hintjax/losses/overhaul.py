"""Overhaul of feature distillation (OFD): matches features before the ReLU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep

LEAST_MASS = 1e-3  # least probability of x < 0 for which its mean is reliable


def batch_norm_margin(
    scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, " c"]:
    """Margins of OFD: the mean of the negative values after a BatchNorm.

    m = E[x | x < 0],  x ~ N(bias, scale^2)

    or m = -3 |scale| if x is negative with a probability of at most 0.001.

    Args:
        scale: the BatchNorm's scale (gamma) of each channel.
        bias: the BatchNorm's bias (beta) of each channel.

    Returns:
        One margin <= 0 for each channel.

    >>> batch_norm_margin(jnp.array([1.0, 1.0]), jnp.array([0.0, 5.0]))
    Array([-0.7978..., -3.        ], dtype=float32)

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, 2019.
        https://arxiv.org/abs/1904.01866
    """
    caller = "batch_norm_margin"
    scale, bias = as_float(caller, scale, bias)
    _checks.same_shape(caller, scale=scale, bias=bias)
    deviation = jnp.abs(scale)
    constant = deviation == 0  # a channel that BatchNorm has switched off
    z = bias / jnp.where(constant, 1, deviation)
    mass = jax.scipy.special.ndtr(-z)
    rare = mass <= LEAST_MASS
    density = jnp.exp(-jnp.square(z) / 2) / jnp.sqrt(jnp.asarray(2 * jnp.pi, z.dtype))
    mean = bias - deviation * density / jnp.where(rare, 1, mass)
    return jnp.where(
        constant, jnp.minimum(bias, 0), jnp.where(rare, -3 * deviation, mean)
    )


def margin_relu(
    features: Float[Array, "*shape c"], margin: Float[Array, " c"]
) -> Float[Array, "*shape c"]:
    """Margin ReLU (OFD): max(x, m_c), with a margin m_c <= 0 for each channel.

    Args:
        features: the teacher's features before the ReLU.
        margin: one margin for each channel (`batch_norm_margin`).

    Returns:
        The features; values below the margin are raised to the margin.

    >>> margin_relu(jnp.array([[-3.0, -0.5, 2.0]]), jnp.full(3, -1.0))
    Array([[-1. , -0.5,  2. ]], dtype=float32)

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, 2019.
    """
    features, margin = as_float("margin_relu", features, margin)
    if margin.shape != features.shape[-1:]:
        wanted = "a margin for each channel"
        got = f"features {features.shape} and margin {margin.shape}"
        raise _checks.Refusal(_checks.message("margin_relu", wanted, got))
    return jnp.maximum(features, jnp.expand_dims(margin, range(features.ndim - 1)))


def partial_l2_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Partial L2 distance (OFD): negative targets are upper bounds.

    L = sum_i (s_i - t_i)^2, but 0 where s_i <= t_i <= 0

    Args:
        student: the guided layer after its regressor, before the ReLU.
        teacher: the hint layer after its `margin_relu`, of the same shape.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the term of the authors' code and of mdistiller for the last pair,
        which both weight by 1e-3; every earlier pair has half the weight of the next
        pair (see `hintjax.overhaul`).

    >>> student = jnp.array([[-3.0, 1.0, -1.0]])
    >>> partial_l2_loss(student, jnp.array([[-1.0, -1.0, 1.0]]))
    Array([8.], dtype=float32)

    References:
        Heo et al.: A Comprehensive Overhaul of Feature Distillation, 2019.
        https://arxiv.org/abs/1904.01866
        https://github.com/clovaai/overhaul-distillation
        https://github.com/megvii-research/mdistiller (OFD.py)
    """
    caller = "partial_l2_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims, "*batch *features", student=student)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    student, teacher = keep(student, where), keep(teacher, where)
    silent = (student <= teacher) & (teacher <= 0)  # false for nan, so nan stays
    squares = jnp.where(silent, 0, jnp.square(student - teacher))
    return jnp.sum(squares, tuple(range(batch_dims, squares.ndim)))
