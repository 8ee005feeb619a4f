"""Knowledge distillation (KD) of softened outputs, also in FitNets' form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep
from hintjax.losses._positions import per_example


def kd_loss(
    student_logits: Float[Array, "*shape classes"],
    teacher_logits: Float[Array, "*shape classes"],
    *,
    temperature: ScalarLike = 4.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Knowledge distillation (KD): divergence of the softened outputs.

    L = T^2 sum_c p_c (log p_c - log q_c),  p = softmax(z_t / T),  q = softmax(z_s / T)

    For outputs with positions (tokens, pixels), L is the mean over the valid positions
    of an example. The factor T^2 keeps the size of the gradient about equal at every
    temperature.

    Args:
        student_logits: logits of the student, (*batch, *positions, classes).
        teacher_logits: logits of the teacher. A logit of -inf excludes a class.
        temperature: T > 0; a larger T shows more of the small probabilities. A traced
            value is not checked.
        batch_dims: number of leading axes over examples.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the classes) that count.

    Returns:
        The divergence of each example, >= 0 up to rounding, in nats times T^2; 0 for a
        fully masked example.

    Convention:
        `.mean()` is T^2 times the paper's objective, without the teacher's entropy,
        which the student cannot change. RepDistiller prints this value ("batchmean");
        torch's `reduction="mean"` is smaller by the number of classes.

    >>> student, teacher = jnp.zeros((2, 3)), jnp.array([[0.0, 0, 0], [8, 0, 0]])
    >>> kd_loss(student, teacher, temperature=4.0)
    Array([0. , 6.928...], dtype=float32)

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.
        https://arxiv.org/abs/1503.02531
    """
    log_q, log_p, temperature = _softened(
        "kd_loss", student_logits, teacher_logits, temperature, batch_dims, where
    )
    values = temperature**2 * divergence(log_p, log_q)
    return per_example(values, where, batch_dims)


def soft_cross_entropy_loss(
    student_logits: Float[Array, "*shape classes"],
    teacher_logits: Float[Array, "*shape classes"],
    *,
    temperature: ScalarLike = 3.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of softened outputs: KD in FitNets' second stage.

    L = -sum_c p_c log q_c,  p = softmax(z_t / T),  q = softmax(z_s / T)

    For outputs with positions (tokens, pixels), L is the mean over the valid positions
    of an example.

    Args:
        student_logits: logits of the student, (*batch, *positions, classes).
        teacher_logits: logits of the teacher. A logit of -inf excludes a class.
        temperature: T > 0, FitNets' tau. A traced value is not checked.
        batch_dims: number of leading axes over examples.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the classes) that count.

    Returns:
        The cross-entropy of each example, in nats; at least the teacher's entropy. 0
        for a fully masked example.

    Convention:
        `.mean()` is H(P_T, P_S) of FitNets' Eq. 2, without lambda, the weight of this
        term. The gradient is the gradient of `kd_loss` divided by T^2.

    >>> student, teacher = jnp.zeros((2, 3)), jnp.array([[0.0, 0, 0], [9, 0, 0]])
    >>> soft_cross_entropy_loss(student, teacher)
    Array([1.098..., 1.098...], dtype=float32)

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, Eq. 2.
        https://arxiv.org/abs/1412.6550
    """
    caller = "soft_cross_entropy_loss"
    log_q, log_p, _ = _softened(
        caller, student_logits, teacher_logits, temperature, batch_dims, where
    )
    p = jnp.exp(log_p)
    # The mask is on log q, not on the product, so that 0 * inf does not reach the
    # gradient either.
    values = -jnp.sum(p * jnp.where(p == 0, 0, log_q), -1)
    return per_example(values, where, batch_dims)


def scaled(
    caller: str,
    student: Array,
    teacher: Array,
    temperature: ScalarLike,
    batch_dims: int,
    where: Array | None,
) -> tuple[Array, Array, Array]:
    """Returns the checked logits of student and teacher over T, and T as an array."""
    student, teacher = as_float(caller, student, teacher)
    do = "Both networks must have the same classes."
    _checks.integer(caller, 0, batch_dims=batch_dims)
    layout = "*batch *positions classes"
    _checks.rank(caller, batch_dims + 1, layout, student_logits=student)
    _checks.same_shape(caller, student_logits=student, teacher_logits=teacher, do=do)
    _checks.positive(caller, temperature=temperature)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    temperature = jnp.asarray(temperature, student.dtype)
    return (
        keep(student, where) / temperature,
        keep(teacher, where) / temperature,
        temperature,
    )


def divergence(log_p: Array, log_q: Array) -> Array:
    """Returns KL(p || q) = sum_c q_c - p_c - p_c log(q_c / p_c) of the last axis.

    The sums of q and of p are both 1 and cancel, but with them no term is negative, and
    near equality the terms are of second order. The terms of p log(p / q) are of first
    order and cancel to second order, which in float32 leaves rounding errors. A class
    of probability 0 is removed before the logarithm, to keep 0 * inf out of the
    gradient too.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_ratio = jnp.where(p == 0, 0, log_q - jnp.where(p == 0, 0, log_p))
    near = (jnp.abs(log_ratio) < 1) & (p != 0)
    ratio = jnp.where(near, log_ratio, 0)
    far = q - p - p * log_ratio
    return jnp.sum(jnp.where(near, p * (jnp.expm1(ratio) - ratio), far), -1)


def _softened(
    caller: str,
    student: Array,
    teacher: Array,
    temperature: ScalarLike,
    batch_dims: int,
    where: Array | None,
) -> tuple[Array, Array, Array]:
    """Returns the log-probabilities of student and teacher, and T as an array."""
    student, teacher, divisor = scaled(
        caller, student, teacher, temperature, batch_dims, where
    )
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher), divisor
