"""Similarity-preserving distillation (SP): matches similarities of examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, unit
from hintjax.losses._batch import count, counted, flat, vectors


def similarity_matrix(
    features: Float[Array, "batch ..."],
    *,
    where: Bool[Array, "batch ..."] | None = None,
) -> Float[Array, "batch batch"]:
    """Similarity matrix (SP): similarity of each two examples of a batch.

    S_i = G_i / ||G_i||_2,  G = F F^T,  F has one row per example

    Args:
        features: activations; all axes but the first are features.
        where: mask of the examples or the positions (batch *positions, all axes but the
            last) that count. Rows and columns of masked examples are 0. The product of
            two examples is over the positions that are valid in both.

    Returns:
        Rows of norm 1; 0 for an example whose features are all 0.

    Convention:
        The same as in the paper and in RepDistiller.

    >>> similarity_matrix(jnp.array([[3.0, 0.0], [0.0, 2.0]]))
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019.
        https://arxiv.org/abs/1907.09682
        https://github.com/HobbitLong/RepDistiller (SP.py)
    """
    features = as_float("similarity_matrix", features)
    _checks.rank("similarity_matrix", 2, "batch *features", features=features)
    shapes = features.shape[:1], features.shape[:-1]
    _checks.mask("similarity_matrix", where, *shapes)
    return _similarity(flat(keep(features, where)))


def similarity_loss(
    student: Float[Array, "batch ..."],
    teacher: Float[Array, "batch ..."],
    *,
    where: Bool[Array, "batch ..."] | None = None,
) -> Float[Array, " batch"]:
    """Similarity-preserving loss (SP): squared difference of the similarities.

    L_i = 1/B sum_j (S_ij(s) - S_ij(t))^2,  S = similarity_matrix

    Args:
        student: activations of the student, of any size.
        teacher: activations of the teacher, of the same examples, of any size.
        where: mask of the examples that count; the loss of the others is 0, and no
            example is compared with them. Or the mask of the positions (batch
            *positions, all axes but the last) that count, if both have the same
            positions; an example without any does not count.

    Returns:
        One value in [0, 4 / B] per anchor i; 0 in a batch of one.

    Convention:
        `.mean()` is ||S(s) - S(t)||_F^2 / B^2, which the paper and RepDistiller weight
        by 3000. An example whose features are all 0 has similarity 0 to all examples,
        and its row has no gradient; in the code the gradient is 1e12.

    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> similarity_loss(student, jnp.ones((2, 3)))
    Array([0.292..., 0.292...], dtype=float32)

    References:
        Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019.
        https://arxiv.org/abs/1907.09682
        https://github.com/HobbitLong/RepDistiller (SP.py)
    """
    caller = "similarity_loss"
    if where is not None and _checks.is_array(where) and where.ndim > 1:
        student, teacher = as_float(caller, student, teacher)
        for x in (student, teacher):
            _checks.mask(caller, where, x.shape[:1], x.shape[:-1])
        student, teacher = keep(student, where), keep(teacher, where)
        where = jnp.any(where, range(1, where.ndim))
    student, teacher = vectors(caller, student, teacher, where)
    square = jnp.square(_similarity(student) - _similarity(teacher))
    valid = counted(student, where)
    return keep(jnp.sum(square, 1) / count(valid, square), where)


def _similarity(rows: Array) -> Array:
    """Returns the similarity matrix of the rows."""
    return unit(jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST))
