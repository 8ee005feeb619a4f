"""Patient distillation (PKD): matches the direction of hidden states."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean, unit


def patient_loss(
    student: Float[Array, "*batch c"],
    teacher: Float[Array, "*batch c"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Patient distillation (PKD): mean squared difference of the unit hidden states.

    L = mean_c (s_c / ||s||_2 - t_c / ||t||_2)^2

    Args:
        student: hidden states of the student, one vector per example (its class token).
        teacher: hidden states of the teacher, of the same width.
        where: mask of the examples that count; the loss of the others is 0.

    Returns:
        One value in [0, 4 / c] per example.

    Convention:
        The authors' code takes the mean of `.mean()` over the pairs of layers and
        weights it by beta (500 in its ready-made run). The paper and TextBrewer sum
        over the c numbers, which gives c times this value. A vector of zeros has no
        direction and no gradient; its gradient is 1e12 in the code and nan in
        TextBrewer.

    >>> patient_loss(jnp.array([3.0, 0.0]), jnp.array([0.0, 5.0]))
    Array(1., dtype=float32)

    References:
        Sun et al.: Patient Knowledge Distillation for BERT Model Compression, 2019.
        https://arxiv.org/abs/1908.09355
        https://github.com/intersun/PKD-for-BERT-Model-Compression (KD_loss.py)
    """
    caller = "patient_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.rank(caller, 1, "*batch c", student=student)
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.mask(caller, where, student.shape[:-1])
    student, teacher = (unit(keep(x, where)) for x in (student, teacher))
    return masked_mean(jnp.square(student - teacher), where, student.ndim - 1)
