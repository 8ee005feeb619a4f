"""Hard-label distillation: the teacher's class as the label (DeiT)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax.losses._positions import per_example
from hintjax.losses.kd import scaled


def hard_label_loss(
    student_logits: Float[Array, "*shape classes"],
    teacher_logits: Float[Array, "*shape classes"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Hard-label distillation: cross-entropy with the teacher's largest class.

    L = -log q_y,  q = softmax(z_s),  y = argmax_c z_t

    Args:
        student_logits: logits of the student; in DeiT, of its distillation head.
        teacher_logits: logits of the teacher. The first of equal logits is taken.
        batch_dims: number of leading axes over examples.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the classes) that count.

    Returns:
        The cross-entropy of each example, in nats, >= 0. There is no gradient for the
        teacher's logits.

    Convention:
        `.mean()` is the second term of DeiT's objective without its weight 1/2 (there,
        `alpha` = 0.5), as the authors' code has it ("hard"). It has no temperature.

    >>> hard_label_loss(jnp.zeros((2, 3)), jnp.array([[0.0, 0, 5], [8, 0, 0]]))
    Array([1.098..., 1.098...], dtype=float32)

    References:
        Touvron et al.: Training Data-Efficient Image Transformers and Distillation
        through Attention, 2021, Eq. 3. https://arxiv.org/abs/2012.12877
        https://github.com/facebookresearch/deit (losses.py)
    """
    student, teacher, _ = scaled(
        "hard_label_loss", student_logits, teacher_logits, 1.0, batch_dims, where
    )
    own = jax.nn.one_hot(teacher.argmax(-1), student.shape[-1], dtype=bool)
    # The mask is on log q, not on a product, so that 0 * inf is not in the gradient.
    values = -jnp.sum(jnp.where(own, jax.nn.log_softmax(student), 0), -1)
    # A teacher of nan has no class.
    values = jnp.where(jnp.isnan(teacher).any(-1), jnp.nan, values)
    return per_example(values, where, batch_dims)
