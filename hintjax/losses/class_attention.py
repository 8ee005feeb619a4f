"""Class attention transfer (CAT-KD): matches the evidence for each class."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import adaptive_average_pool, as_float, keep, unit
from hintjax.losses._positions import check_maps, positions


def class_activation_map(
    features: Float[Array, "*shape c"], kernel: Float[Array, "c classes"]
) -> Float[Array, "*shape classes"]:
    """Class activation map (CAM): each position's part in each class's logit.

    CAM_jk = sum_c F_jc W_ck,  j over the positions

    Args:
        features: the last map before the global average pooling, (*batch *positions c).
        kernel: the kernel of the classifier after the pooling.

    Returns:
        One map for each class; the mean of the map is the logit minus the bias.

    >>> class_activation_map(jnp.ones((1, 1, 2)), jnp.array([[1.0], [2.0]]))
    Array([[[3.]]], dtype=float32)
    """
    caller = "class_activation_map"
    features, kernel = as_float(caller, features, kernel)
    _checks.rank(caller, 2, "*batch *positions c", features=features)
    if kernel.ndim != 2 or kernel.shape[0] != features.shape[-1]:
        wanted = "a kernel (c, classes) for features (*batch, *positions, c)"
        got = f"features {features.shape} and kernel {kernel.shape}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    return jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST)


def class_attention_loss(
    student: Float[Array, "*shape classes"],
    teacher: Float[Array, "*shape2 classes"],
    *,
    size: int = 2,
    batch_dims: int = 1,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Class attention transfer (CAT-KD): mean squared difference of coarse CAMs.

    L = mean_jk (u_jk(s) - u_jk(t))^2,  u_k = pool(CAM_k) / ||pool(CAM_k)||_2

    where pool is the adaptive average pooling to size x size positions j (size for a
    sequence, size x size x size for a volume).

    Args:
        student: class activation maps of the student (`class_activation_map`),
            (*batch *positions classes).
        teacher: class activation maps of the teacher, of the same classes, with
            positions on as many axes; the sizes may differ.
        size: size of each axis after the pooling, an integer >= 1.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a masked example.

    Convention:
        `.mean()` is the value that the authors' code weights by 400 (with
        IF_NORMALIZE).

    >>> one = jnp.array([[[[1.0], [0.0]], [[0.0], [0.0]]]])
    >>> class_attention_loss(one, one[:, ::-1])
    Array([0.5], dtype=float32)

    References:
        Guo et al.: Class Attention Transfer Based Knowledge Distillation, 2023.
        https://arxiv.org/abs/2304.12777
        https://github.com/GzyAftermath/CAT-KD (CAT_KD.py)
    """
    caller = "class_attention_loss"
    student, teacher = as_float(caller, student, teacher)
    check_maps(caller, batch_dims, student=student, teacher=teacher)
    if student.shape[-1] != teacher.shape[-1]:
        wanted = "student and teacher to have the same examples and classes"
        got = f"student {student.shape} and teacher {teacher.shape}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    _checks.positive_int(caller, size=size)
    _checks.mask(caller, where, student.shape[:batch_dims])
    axes = positions(student, batch_dims)
    ours, theirs = (
        unit(adaptive_average_pool(keep(x, where), len(axes) * (size,)), axes)
        for x in (student, teacher)
    )
    return jnp.mean(jnp.square(ours - theirs), (*axes, -1))
