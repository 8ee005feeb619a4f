"""Activation boundaries (AB): matches which neurons are active."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep


def activation_boundary_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    margin: ScalarLike = 1.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Activation boundaries (AB): each neuron is active exactly where the teacher's is.

    L = sum_i max(0, m - s_i)^2 if t_i > 0, else max(0, m + s_i)^2

    Both activations come from before the ReLU. Only the sign of the teacher's is used,
    so the teacher has no gradient.

    Args:
        student: the guided layer after its regressor, before the ReLU.
        teacher: the hint layer before its ReLU, of the same shape.
        margin: m > 0, the distance that the student should keep from the boundary. A
            traced value is not checked.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example. The loss
        is 0 for a student with the teacher's signs and all |s_i| >= m, but not for a
        student equal to the teacher.

    Convention:
        `.mean()` times 3 / 1000 is RepDistiller's term for the last pair; every earlier
        pair has half the weight of the next pair (see `hintjax.activation_boundary`).

    >>> student = jnp.array([[-2.0, 0.0, 3.0]])
    >>> activation_boundary_loss(student, jnp.array([[-1.0, 1.0, -1.0]]))
    Array([17.], dtype=float32)

    References:
        Heo et al.: Knowledge Transfer via Distillation of Activation Boundaries, 2019,
        https://arxiv.org/abs/1811.03233
        https://github.com/HobbitLong/RepDistiller (AB.py)
    """
    caller = "activation_boundary_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims, "*batch *features", student=student)
    _checks.positive(caller, margin=margin)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    student, teacher = keep(student, where), keep(teacher, where)
    margin = jnp.asarray(margin, student.dtype)
    away = jnp.where(teacher > 0, -student, student) + margin
    away = jnp.where(jnp.isnan(teacher), teacher, away)  # comparisons drop nan
    squares = keep(jnp.square(jnp.maximum(away, 0)), where)
    return jnp.sum(squares, tuple(range(batch_dims, squares.ndim)))
