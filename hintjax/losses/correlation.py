"""Correlation congruence (CC): matches embeddings along the batch."""

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
    """Correlation congruence (CC) as in RepDistiller: products of neighbors' errors.

    L_i = B / (B - 1) (e_{i-1} + e_i) / 2
    e_i = sum_n |s_i - t_i|_n |s_{i+1} - t_{i+1}|_n

    i runs in the order of the batch; the e before the first example and after the last
    example are 0. The error of an example costs only if a neighbor has an error too.

    Args:
        student: embeddings of the student.
        teacher: embeddings of the teacher, of the same shape.
        where: mask of the examples that count; the loss of the others is 0, and they
            are not neighbors of any example.

    Returns:
        One value >= 0 per example; 0 in a batch of one.

    Convention:
        `.mean()` is the mean of the B - 1 products e that RepDistiller weights by 0.02;
        each product is shared by its two examples. The paper instead compares
        correlation matrices of a Gaussian kernel; RepDistiller's published results
        were made with this form. For a batch of one the loss is 0, and the code gives
        nan.

    >>> student = jnp.array([[1.0], [2.0], [3.0]])
    >>> correlation_loss(student, jnp.zeros((3, 1)))
    Array([1.5, 6. , 4.5], dtype=float32)

    References:
        Peng et al.: Correlation Congruence for Knowledge Distillation, 2019.
        https://arxiv.org/abs/1904.01802
        https://github.com/HobbitLong/RepDistiller (CC.py)
    """
    do = "Embed both in one space, as hintjax.correlation_congruence does."
    student, teacher = as_float("correlation_loss", student, teacher)
    _checks.same_shape("correlation_loss", student=student, teacher=teacher, do=do)
    student, teacher = vectors("correlation_loss", student, teacher, where)
    error = absolute_power(student - teacher, 1)
    if where is not None:  # unmasked examples become neighbors; masked ones are 0
        order = jnp.argsort(~where, stable=True)
        error = error[order]
    products = jnp.sum(error[:-1] * error[1:], 1)
    number = count(counted(error, where), error)
    shared = (jnp.pad(products, (1, 0)) + jnp.pad(products, (0, 1))) / 2
    values = shared * number / jnp.maximum(number - 1, 1)
    return values if where is None else values[jnp.argsort(order)]
