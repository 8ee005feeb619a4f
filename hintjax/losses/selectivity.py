"""Neuron selectivity transfer (NST): matches where the neurons are active."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, at_smaller_size, keep, unit


def selectivity_loss(
    student: Float[Array, "*batch h w c"],
    teacher: Float[Array, "*batch h2 w2 c2"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Neuron selectivity transfer (NST): distance of two distributions of neurons.

    L = mean K(s, s) + mean K(t, t) - 2 mean K(s, t),  K(a, b) = <a, b>^2

    The means are over all pairs of channels; each channel is a map divided by its norm.
    L is the squared maximum mean discrepancy (MMD) with the polynomial kernel of
    degree 2.

    Args:
        student: feature map of the student.
        teacher: feature map of the teacher, of any size and channels; the larger of
            the two maps is averaged down to the size of the smaller.
        where: mask of the examples, or of the positions of the smaller map
            (*batch h w), that count.

    Returns:
        One value >= 0 (up to rounding) per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that RepDistiller weights by 50. The code holds all
        products of two channels at all positions; this function computes three Gram
        matrices.

    >>> teacher = jnp.eye(2).reshape(1, 1, 2, 2)  # each channel selects one position
    >>> selectivity_loss(teacher[..., :1], teacher)
    Array([0.5], dtype=float32)

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity
        Transfer, 2017. https://arxiv.org/abs/1707.01219
        https://github.com/HobbitLong/RepDistiller (NST.py)
    """
    caller = "selectivity_loss"
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 3, "*batch h w c", student=student, teacher=teacher)
    _checks.same_leading(caller, 3, student=student, teacher=teacher)
    student, teacher = at_smaller_size(student, teacher)
    _checks.mask(caller, where, student.shape[:-3], student.shape[:-1])
    s, t = (unit(keep(x, where), (-3, -2)) for x in (student, teacher))
    return _kernel(s, s) + _kernel(t, t) - 2 * _kernel(s, t)


def _kernel(a: Array, b: Array) -> Array:
    """Returns the mean of <a_i, b_j>^2 over all pairs of channels."""
    precision = jax.lax.Precision.HIGHEST
    gram = jnp.einsum("...hwi,...hwj->...ij", a, b, precision=precision)
    return jnp.mean(jnp.square(gram), (-2, -1))
