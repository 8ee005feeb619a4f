"""Decoupled KD (DKD): KD in two parts, the label's class and the other classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from hintjax import _checks
from hintjax.losses._positions import per_example
from hintjax.losses.kd import divergence, scaled


def decoupled_kd_loss(
    student_logits: Float[Array, "*shape classes"],
    teacher_logits: Float[Array, "*shape classes"],
    label: Int[Array, "*shape"],
    *,
    alpha: ScalarLike = 1.0,
    beta: ScalarLike = 8.0,
    temperature: ScalarLike = 4.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Decoupled knowledge distillation (DKD): the label's class apart from the others.

    L = T^2 (alpha KL(b_t || b_s) + beta KL(r_t || r_s)),  p = softmax(z / T)

    b = (p_y, 1 - p_y) says how confident a network is of the label y.
    r = p_c / (1 - p_y) is its distribution over the other classes c != y. In KD, the
    teacher's 1 - p_y takes the place of beta: a confident teacher teaches little about
    the other classes. For outputs with positions (tokens, pixels), L is the mean over
    the valid positions of an example.

    Args:
        student_logits: logits of the student, (*batch, *positions, classes), for 2 or
            more classes.
        teacher_logits: logits of the teacher. A logit of -inf excludes a class.
        label: y, the true class of each example or position, (*batch, *positions). At
            masked positions it may be any integer.
        alpha: weight of the first term, the label's class against the other classes.
        beta: weight of the second term, the distribution over the other classes.
        temperature: T > 0. A traced value is not checked.
        batch_dims: number of leading axes over examples.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the classes) that count.

    Returns:
        One value per example, >= 0 up to rounding; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that mdistiller prints, with alpha 1, T = 4 and beta 8 (2
        for ResNet-56 and 110, 6 for WRN and VGG). log(1 - p_y) is computed from the
        other classes, not from p_y: it is exact even at margins of 100, where the code
        gives inf and nan.

    >>> student, teacher = jnp.zeros((2, 3)), jnp.array([[0.0, 0, 0], [8, 0, 0]])
    >>> decoupled_kd_loss(student, teacher, jnp.array([0, 0]))
    Array([0. , 6.928...], dtype=float32)

    References:
        Zhao et al.: Decoupled Knowledge Distillation, 2022.
        https://arxiv.org/abs/2203.08679
        https://github.com/megvii-research/mdistiller (DKD.py)
    """
    caller = "decoupled_kd_loss"
    student, teacher, temperature = scaled(
        caller, student_logits, teacher_logits, temperature, batch_dims, where
    )
    *places, classes = student.shape
    if classes < 2:
        raise _checks.Refusal(
            _checks.message(caller, "2 or more classes", f"{classes}")
        )
    _checks.labels(caller, tuple(places), label=label)
    _checks.not_negative(caller, alpha=alpha, beta=beta)
    own = jax.nn.one_hot(label, classes, dtype=bool)
    (sure_s, rest_s), (sure_t, rest_t) = _split(student, own), _split(teacher, own)
    target = divergence(sure_t, sure_s)
    others = divergence(rest_t, rest_s)
    values = temperature**2 * (alpha * target + beta * others)
    return per_example(values, where, batch_dims)


def _split(z: Array, own: Array) -> tuple[Array, Array]:
    """Returns the logs of (p_y, 1 - p_y) and of the other classes' distribution."""
    all_classes = jax.nn.logsumexp(z, -1)
    label = jnp.sum(jnp.where(own, z, 0), -1)
    others = jax.nn.logsumexp(z, -1, where=~own)
    sure = jnp.stack([label - all_classes, others - all_classes], -1)
    return sure, jax.nn.log_softmax(z, -1, where=~own)
