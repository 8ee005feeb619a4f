"""Hierarchical context loss (HCL) of ReviewKD: matches maps at several scales."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import adaptive_average_pool, as_float, keep
from hintjax.losses._positions import check_maps, positions


def hierarchical_context_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape c"],
    *,
    levels: tuple[int, ...] = (4, 2, 1),
    batch_dims: int = 1,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Hierarchical context loss (HCL): squared errors of a map and its poolings.

    L = (MSE(s, t) + sum_k 2^-k MSE(pool_k s, pool_k t)) / (1 + sum_k 2^-k)

    where pool_k is the adaptive average pooling to l x l (l for a sequence, l x l x l
    for a volume) for the k-th level l that is smaller than the map, k = 1, 2, ...

    Args:
        student: a map of the student after its ABF (`hintjax.regressors.ABF`),
            (*batch *positions c).
        teacher: the teacher's map.
        levels: sizes l of the poolings. A level that is not smaller than all sides of
            the map is skipped, and takes no weight.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value of one stage in the authors' code. The code *sums* over
        stages (see `hintjax.review`) and weights the sum by 0.6 to 8. A map of 1 x 1
        has no levels, so its value is the MSE.

    >>> student = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> hierarchical_context_loss(student, jnp.zeros((1, 2, 2, 1)))  # (3.5 + 1.125)/1.5
    Array([3.0833333], dtype=float32)

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, 2021, section 3.4.
        https://arxiv.org/abs/2104.09044
        https://github.com/dvlab-research/ReviewKD (hcl)
    """
    caller = "hierarchical_context_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put an ABF between them (hintjax.regressors.ABF)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    check_maps(caller, batch_dims, student=student)
    _checks.mask(caller, where, student.shape[:batch_dims])
    _checks.instance(caller, Sequence, levels=levels)
    for level in levels:
        _checks.positive_int(caller, level=level)
    # Pooling is linear, so the error is pooled once instead of both maps.
    error = keep(student - teacher, where)
    axes = positions(error, batch_dims)
    total, weight, weights = jnp.mean(jnp.square(error), (*axes, -1)), 1.0, 1.0
    for level in levels:
        if level < min(error.shape[batch_dims:-1]):
            weight /= 2
            weights += weight
            pooled = adaptive_average_pool(error, len(axes) * (level,))
            total = total + weight * jnp.mean(jnp.square(pooled), (*axes, -1))
    return total / weights
