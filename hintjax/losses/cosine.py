"""Cosine loss (DistilBERT): matches the direction of hidden states."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean, unit


def cosine_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cosine loss (DistilBERT): one minus the cosine between hidden states.

    L = mean_i (1 - <s_i, t_i> / (||s_i||_2 ||t_i||_2)),  i over the positions

    Args:
        student: hidden states of the student: tokens (*batch n c), or one vector
            (*batch c).
        teacher: hidden states of the teacher, of the same shape.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions that count.

    Returns:
        One value in [0, 2], up to rounding, per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that DistilBERT weights by 1 and TextBrewer prints as
        cos. Both take the mean over all tokens of a batch at once; here each example
        has the same weight, whatever its length. The cosine of a vector of zeros is 0,
        without gradient.

    >>> cosine_loss(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[9.0, 0], [0, 9]]))
    Array([0., 1.], dtype=float32)

    References:
        Sanh et al.: DistilBERT, a distilled version of BERT, 2019.
        https://arxiv.org/abs/1910.01108
        https://github.com/huggingface/transformers (distillation/distiller.py)
        https://github.com/airaria/TextBrewer (losses.py, cos)
    """
    caller = "cosine_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims + 1, "*batch *positions c", student=student)
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    student, teacher = (unit(keep(x, where)) for x in (student, teacher))
    return masked_mean(1 - jnp.sum(student * teacher, -1), where, batch_dims)
