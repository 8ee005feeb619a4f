"""DIST: matches outputs by correlation, within and between examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import deviations, keep, norm
from hintjax.losses._positions import per_example
from hintjax.losses.kd import scaled

EPS = 1e-8  # as published


def dist_loss(
    student_logits: Float[Array, "batch *positions classes"],
    teacher_logits: Float[Array, "batch *positions classes"],
    *,
    beta: ScalarLike = 1.0,
    gamma: ScalarLike = 1.0,
    temperature: ScalarLike = 1.0,
    where: Bool[Array, "batch ..."] | None = None,
) -> Float[Array, " batch"]:
    """Distillation from a stronger teacher (DIST): one minus the correlations.

    L_i = T^2 (beta (1 - r(q_i, p_i)) + gamma (1 - mean_c r(q_:c, p_:c)))

    r is Pearson's correlation of the probabilities q (student) and p (teacher): over
    the classes of one example i, and over the examples of the batch for one class c.

    For outputs with positions (tokens, pixels), every position is one more row of the
    batch: the first term is the mean over the valid positions of example i, and the
    correlation of a class is over all valid positions of all examples::

        L_i = T^2 (beta mean_j (1 - r(q_ij, p_ij)) + gamma (1 - mean_c r(q_::c, p_::c)))

    Args:
        student_logits: logits of the student, (batch, *positions, classes).
        teacher_logits: logits of the teacher.
        beta: weight of the first term (the code's "inter-class").
        gamma: weight of the second term (the code's "intra-class").
        temperature: T > 0. A traced value is not checked.
        where: mask of the examples (batch) or the positions (batch, *positions) that
            count; no correlation includes the others.

    Returns:
        One value in [0, 2 T^2 (beta + gamma)] per example; the second term is the
        same for all examples of the batch. 0 for a fully masked example.

    Convention:
        `.mean()` is the value that the authors' code prints, with weight 1. A constant
        has correlation 0 and no gradient (in the code a gradient of up to 1e8): in a
        batch of one the second term is gamma T^2, as in the code. The code takes
        (batch, classes) alone; with one row for each valid position it gives the same
        second term, and the first term with equal weight for each position.

    >>> student, teacher = jnp.array([[0.0, 1], [1, 0]]), jnp.array([[0.0, 9], [9, 0]])
    >>> dist_loss(student, teacher).round(5), dist_loss(-student, teacher).round(5)
    (Array([0., 0.], dtype=float32), Array([4., 4.], dtype=float32))

    References:
        Huang et al.: Knowledge Distillation from A Stronger Teacher, 2022.
        https://arxiv.org/abs/2205.10536
        https://github.com/hunto/DIST_KD (dist_kd.py)
    """
    caller = "dist_loss"
    student, teacher, temperature = scaled(
        caller, student_logits, teacher_logits, temperature, 1, where
    )
    _checks.not_negative(caller, beta=beta, gamma=gamma)
    q, p = jax.nn.softmax(student), jax.nn.softmax(teacher)
    within = per_example(1 - _pearson(q, p), where, 1)
    rows = [x.reshape(-1, x.shape[-1]).T for x in (q, p)]
    between = 1 - jnp.mean(_pearson(rows[0], rows[1], _rows(where, q.shape[:-1])))
    values = temperature**2 * (beta * within + gamma * between)
    if where is not None and where.ndim > 1:
        where = jnp.any(where, range(1, where.ndim))
    return keep(values, where)


def _rows(where: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Returns the mask of all positions of all examples, in one row."""
    if where is None:
        return None
    where = jnp.expand_dims(where, range(where.ndim, len(shape)))
    return jnp.broadcast_to(where, shape).reshape(-1)


def _pearson(x: Array, y: Array, where: Array | None = None) -> Array:
    """Returns the correlation along the last axis; that of a constant is 0."""
    x, y = deviations(x, where), deviations(y, where)
    return jnp.sum(x * y, -1) / (norm(x) * norm(y) + EPS)
