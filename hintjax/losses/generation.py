"""Masked generative distillation (MGD): generates the teacher's features."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep


def masked_generation_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Masked generative distillation (MGD): squared distance of generated features.

    L = sum_i (G(mask * align(s))_i - t_i)^2,  i over all features of one example

    The method `masked_generation` has the masking, the alignment and the generator G.

    Args:
        student: output of the generator for the student's masked features.
        teacher: the hint layer, of the same shape.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that the authors' code weights by alpha, 7e-5 for
        classification.

    >>> masked_generation_loss(jnp.ones((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3)))
    Array([12.], dtype=float32)

    References:
        Yang et al.: Masked Generative Distillation, 2022.
        https://arxiv.org/abs/2205.01529
        https://github.com/yzd-v/MGD (mgd.py)
    """
    caller = "masked_generation_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "The generator must give the teacher's channels."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims, "*batch *features", student=student)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    squares = jnp.square(keep(student - teacher, where))
    return jnp.sum(squares, tuple(range(batch_dims, squares.ndim)))
