"""Matching embeddings along the batch: correlation congruence (CC)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import absolute_power, as_float
from hintjax.losses._batch import count, counted, vectors


def correlation_loss(
    student: Float[Array, "batch ..."],
    teacher: Float[Array, "batch ..."],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Correlation congruence (CC), the benchmark's form: errors of neighbours.

    L_i = B / (B - 1) (e_{i-1} + e_i) / 2,  e_i = sum_n |s_i - t_i|_n |s_{i+1} - t_{i+1}|_n

    with i in the order of the batch, and no e before the first and after the last. An
    error costs only where the next example has one too.

    Args:
        student: embeddings of the student.
        teacher: embeddings of the teacher, of the same shape.
        where: the examples that count; the others are 0 and neighbours of none.

    Returns:
        One value >= 0 per example; 0 in a batch of one.

    Convention:
        `.mean()` is the mean of the B - 1 products e that RepDistiller weighs by 0.02,
        each shared by its two examples. The paper compares correlation matrices of a
        Gaussian kernel instead; the benchmark's figures were made with this form. A
        batch of one is 0, where the code has nan.

    >>> student = jnp.array([[1.0], [2.0], [3.0]])
    >>> correlation_loss(student, jnp.zeros((3, 1)))
    Array([1.5, 6. , 4.5], dtype=float32)

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, 2019.
        https://arxiv.org/abs/1904.01802
        https://github.com/HobbitLong/RepDistiller (CC.py)
    """
    do = "Embed both in one space (hintjax.correlation_congruence does)."
    student, teacher = as_float("correlation_loss", student, teacher)
    _checks.same_shape("correlation_loss", student=student, teacher=teacher, do=do)
    student, teacher = vectors("correlation_loss", student, teacher, where)
    error = absolute_power(student - teacher, 1)
    if where is not None:  # those that count become neighbours; all others are 0
        order = jnp.argsort(~where, stable=True)
        error = error[order]
    products = jnp.sum(error[:-1] * error[1:], 1)
    number = count(counted(error, where), error)
    shared = (jnp.pad(products, (1, 0)) + jnp.pad(products, (0, 1))) / 2
    values = shared * number / jnp.maximum(number - 1, 1)
    return values if where is None else values[jnp.argsort(order)]
