"""KD of sigmoid outputs: two classes from one logit, or many classes at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax.losses._positions import per_example
from hintjax.losses.kd import divergence, scaled


def binary_kd_loss(
    student_logits: Float[Array, "*shape classes"],
    teacher_logits: Float[Array, "*shape classes"],
    *,
    temperature: ScalarLike = 4.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """KD of sigmoids: divergence of the Bernoulli distribution of each class, summed.

    L = T^2 sum_c KL(B(p_c) || B(q_c)),  p = sigmoid(z_t / T),  q = sigmoid(z_s / T)

    KL(B(p) || B(q)) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    Args:
        student_logits: logits of the student: one logit (classes = 1) for two classes,
            or one logit for each class that an example may be of.
        teacher_logits: logits of the teacher.
        temperature: T > 0. A traced value is not checked.
        batch_dims: number of leading axes over examples.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the classes) that count.

    Returns:
        The divergence of each example, >= 0 up to rounding, in nats times T^2.

    Convention:
        `.mean()` is T^2 times the sum over classes. For one logit z it is `kd_loss` of
        the two logits (0, z). A mean over classes is smaller by their number.

    >>> binary_kd_loss(jnp.zeros((2, 1)), jnp.array([[0.0], [8.0]]))
    Array([0.       , 5.24...], dtype=float32)

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, with
        sigmoids for the softmax. https://arxiv.org/abs/1503.02531
    """
    student, teacher, temperature = scaled(
        "binary_kd_loss", student_logits, teacher_logits, temperature, batch_dims, where
    )
    per_class = divergence(_logs(teacher), _logs(student))
    values = temperature**2 * jnp.sum(per_class, -1)
    return per_example(values, where, batch_dims)


def _logs(z: Array) -> Array:
    """Returns the logs of p and of 1 - p, along a new last axis."""
    return jnp.stack([jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)], -1)
