"""Neuron selectivity transfer (NST): matches where the neurons are active."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax._numerics import keep, unit
from hintjax.losses._positions import on_one_grid, positions, products


def selectivity_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape2 c2"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Neuron selectivity transfer (NST): distance of two distributions of neurons.

    L = mean K(s, s) + mean K(t, t) - 2 mean K(s, t),  K(a, b) = <a, b>^2

    The means are over all pairs of channels; each channel is a map divided by its norm.
    L is the squared maximum mean discrepancy (MMD) with the polynomial kernel of
    degree 2.

    Args:
        student: feature map of the student, (*batch *positions c): a map (h w), a
            sequence or tokens (n), or a volume (d h w).
        teacher: feature map of the teacher, of any size and channels; the larger of
            the two maps is averaged down to the size of the smaller.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

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
    student, teacher = on_one_grid(
        "selectivity_loss", batch_dims, where, student=student, teacher=teacher
    )
    axes = positions(student, batch_dims)
    s, t = (unit(keep(x, where), axes) for x in (student, teacher))

    def kernel(a: Array, b: Array) -> Array:
        return jnp.mean(jnp.square(products(a, b, batch_dims)), (-2, -1))

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)
