"""Probabilistic knowledge transfer (PKT): matches distributions of similarities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax._numerics import keep, norm
from hintjax.losses._batch import count, counted, vectors

EPS = 1e-7  # as published


def probability_loss(
    student: Float[Array, "batch ..."],
    teacher: Float[Array, "batch ..."],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Probabilistic knowledge transfer (PKT): divergence of the similarities.

    L_i = 1/B sum_j p_ij log((p_ij + e) / (q_ij + e)),  p_i ~ (1 + cos(t_i, t_j)) / 2

    p (teacher) and q (student) are the cosine similarities of the examples, shifted to
    [0, 1] and divided by the sum of their row; e = 1e-7.

    Args:
        student: embeddings of the student, of any size.
        teacher: embeddings of the teacher, of the same examples, of any size.
        where: mask of the examples that count; the loss of the others is 0, and no
            example is compared with them.

    Returns:
        One value >= 0, up to e, per anchor i; 0 in a batch of one.

    Convention:
        `.mean()` is the value that the authors' code and RepDistiller weight by 30000.
        The mean is over all B^2 pairs, so it is 1/B of the mean divergence of the rows.
        An example of norm <= e has cosine 0 to all others, and no gradient; in the code
        the gradient is nan at norm 0 and 1e7 near it.

    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> probability_loss(student, jnp.ones((2, 3)))
    Array([0.0294..., 0.0294...], dtype=float32)

    References:
        Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge
        Transfer, 2018. https://arxiv.org/abs/1803.10837
        https://github.com/HobbitLong/RepDistiller (PKT.py)
    """
    student, teacher = vectors("probability_loss", student, teacher, where)
    valid = counted(student, where)
    q, p = _neighbors(student, valid), _neighbors(teacher, valid)
    # sum p log(p / q) = sum p (r - log(1 + r)) for r = q / p - 1, because p and q have
    # the same sum. These terms are of second order; the terms of p log(p / q) are of
    # first order and cancel.
    r = (q - p) / (p + EPS)
    small = jnp.abs(r) < 0.5
    exact = jnp.log1p(jnp.where(small, r, 0))
    log = jnp.where(small, exact, jnp.log((q + EPS) / (p + EPS)))
    divergence = jnp.sum((p + EPS) * (r - log) + EPS * log, 1)
    return keep(divergence / count(valid, divergence), where)


def _neighbors(rows: Array, valid: Array) -> Array:
    """Returns conditional probabilities computed from cosine similarities."""
    length = norm(rows)[:, None]
    rows = rows / (length + EPS)
    # A row of norm <= EPS has a slope of 1 / EPS and no direction: it is a constant.
    rows = jnp.where(length <= EPS, jax.lax.stop_gradient(rows), rows)
    cosine = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.where(valid[None, :], (cosine + 1) / 2, 0)
    total = jnp.sum(similarity, 1, keepdims=True)
    # The total is 0 if all examples of the row are masked.
    return similarity / jnp.where(total == 0, 1, total)
