"""Matching where neurons switch on: activation boundaries (AB)."""

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
    """Activation boundaries (AB): each neuron is on exactly where the teacher's is.

    L = sum_i max(0, m - s_i)^2 if t_i > 0, else max(0, m + s_i)^2

    Both before the ReLU. Of the teacher only the sign is read: it has no gradient.

    Args:
        student: the guided layer behind its regressor, before the ReLU.
        teacher: the hint layer before its ReLU, of the same shape.
        margin: m > 0, how far from the boundary the student should stay. It may be
            traced, and is not checked then.
        batch_dims: how many leading axes count examples; the others are features.
        where: what counts: examples (shape of the leading axes) or positions (all
            axes but the last, the channels).

    Returns:
        One value >= 0 per example; 0 where nothing counts. It is 0 for a student with
        the teacher's signs and all |s_i| >= m, not for one equal to the teacher.

    Convention:
        `.mean()` times 3 / 1000 is RepDistiller's term for the last pair; every pair
        before counts half of the next one (see `hintjax.activation_boundary`).

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
    away = jnp.where(jnp.isnan(teacher), teacher, away)  # a comparison would lose it
    squares = keep(jnp.square(jnp.maximum(away, 0)), where)
    return jnp.sum(squares, tuple(range(batch_dims, squares.ndim)))
