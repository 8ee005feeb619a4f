"""Smooth L1 and its sum with the cosine (AM-RADIO, Theia): matches features."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean
from hintjax.losses.cosine import cosine_loss
from hintjax.losses.hint import hint_loss


def smooth_l1_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    beta: ScalarLike = 1.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Smooth L1 loss: squared error near 0, absolute error far away.

    L = mean_i r(s_i - t_i),  r(d) = d^2 / (2 beta)  if |d| < beta,  else |d| - beta / 2

    i runs over all features of one example. Few large errors, of outlier features of
    the teacher, count less than in a squared error.

    Args:
        student: features of the student, of any rank.
        teacher: features of the teacher, of the same shape.
        beta: the error > 0 at which the slope becomes constant, in the units of the
            features. A traced value is not checked.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is torch's `smooth_l1_loss`. For beta = 1 it is half the mean squared
        error of small errors.

    >>> smooth_l1_loss(jnp.array([[0.5, 3.0]]), jnp.zeros((1, 2)))
    Array([1.3125], dtype=float32)

    References:
        Girshick: Fast R-CNN, 2015. https://arxiv.org/abs/1504.08083
    """
    caller = "smooth_l1_loss"
    student, teacher = _checked(caller, student, teacher, batch_dims, where)
    _checks.positive(caller, beta=beta)
    beta = jnp.asarray(beta, student.dtype)
    size = jnp.abs(student - teacher)
    near = size < beta
    square = jnp.square(jnp.where(near, student - teacher, 0)) / (2 * beta)
    far = jnp.where(near, 0, size - beta / 2)
    return masked_mean(square + far, where, batch_dims)


def cosine_smooth_l1_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    cosine: ScalarLike = 0.9,
    smooth_l1: ScalarLike = 0.1,
    mse: ScalarLike = 0.0,
    beta: ScalarLike = 1.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """AM-RADIO's feature loss: the cosine at each position, and smooth L1.

    L = w_cos mean_j (1 - cos(s_j, t_j)) + w_sl1 smooth_l1(s, t) + w_mse mse(s, t)

    j runs over the positions of one example. The cosine does not see the scale of the
    features, which differs by factors of 100 between foundation models.

    Args:
        student: features of the student, (*batch *positions c).
        teacher: features of the teacher, of the same shape.
        cosine: the weight >= 0 of the cosine (`cosine_loss`).
        smooth_l1: the weight >= 0 of `smooth_l1_loss`.
        mse: the weight >= 0 of the mean squared error (`hint_loss`).
        beta: see `smooth_l1_loss`; AM-RADIO's released code takes 2.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions that count.

    Returns:
        One value >= 0, up to rounding, per example; 0 for a fully masked example.

    Convention:
        `.mean()` is AM-RADIO's loss of spatial features with weights 0.9 and 0.1, and
        UNIC's with 0.5 and 0.5. Theia takes the cosine over the whole map:
        `cosine_smooth_l1_map_loss`.

    >>> student = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> cosine_smooth_l1_loss(student, jnp.array([[0.0, 1.0], [0.0, 1.0]]))
    Array([0.95 , 0.075], dtype=float32)

    References:
        Ranzinger et al.: AM-RADIO: Agglomerative Vision Foundation Model, 2024, Eq. 3.
        https://arxiv.org/abs/2312.06709
        Sariyildiz et al.: UNIC: Universal Classification Models via Multi-teacher
        Distillation, 2024. https://github.com/naver/unic (modeling/losses.py)
    """
    caller = "cosine_smooth_l1_loss"
    student, teacher = _checked(caller, student, teacher, batch_dims, where)
    _checks.rank(caller, batch_dims + 1, "*batch *positions c", student=student)
    direction = cosine_loss(student, teacher, batch_dims=batch_dims, where=where)
    return _weighted(
        caller, direction, student, teacher, cosine, smooth_l1, mse, beta, where
    )


def cosine_smooth_l1_map_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    cosine: ScalarLike = 0.9,
    smooth_l1: ScalarLike = 0.1,
    mse: ScalarLike = 0.0,
    beta: ScalarLike = 1.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Theia's feature loss: one cosine of the whole map, and smooth L1.

    L = w_cos (1 - cos(s, t)) + w_sl1 smooth_l1(s, t) + w_mse mse(s, t)

    The cosine is that of all features of one example in one vector, so positions with
    large features count more than in `cosine_smooth_l1_loss`.

    Args:
        student: features of the student, (*batch *positions c).
        teacher: features of the teacher, of the same shape, standardized by channel in
            Theia (`channel_standardization`).
        cosine: the weight >= 0 of the cosine.
        smooth_l1: the weight >= 0 of `smooth_l1_loss`.
        mse: the weight >= 0 of the mean squared error (`hint_loss`).
        beta: see `smooth_l1_loss`.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples or positions that count.

    Returns:
        One value >= 0, up to rounding, per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the loss of one teacher in Theia's code ("cos_l1"); its weights of
        teachers are not applied there.

    >>> student = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> teacher = jnp.array([[0.0, 1.0], [0.0, 1.0]])
    >>> cosine_smooth_l1_map_loss(student[None], teacher[None], smooth_l1=0.0)
    Array([0.2962...], dtype=float32)

    References:
        Shang et al.: Theia: Distilling Diverse Vision Foundation Models for Robot
        Learning, 2024. https://arxiv.org/abs/2407.20179
        https://github.com/bdaiinstitute/theia
    """
    caller = "cosine_smooth_l1_map_loss"
    student, teacher = _checked(caller, student, teacher, batch_dims, where)
    _checks.rank(caller, batch_dims + 1, "*batch *positions c", student=student)
    batch = student.shape[:batch_dims]
    whole = (x.reshape(*batch, -1) for x in (student, teacher))
    direction = cosine_loss(*whole, batch_dims=batch_dims)
    if where is not None:
        some = jnp.any(where, tuple(range(batch_dims, where.ndim)))
        direction = keep(direction, some)
    return _weighted(
        caller, direction, student, teacher, cosine, smooth_l1, mse, beta, where
    )


def _checked(
    caller: str, student: Array, teacher: Array, batch_dims: int, where: Array | None
) -> list[Array]:
    """Returns both, checked, and 0 where masked."""
    arrays = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.same_shape(caller, student=arrays[0], teacher=arrays[1], do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims, "*batch *features", student=arrays[0])
    _checks.mask(caller, where, arrays[0].shape[:batch_dims], arrays[0].shape[:-1])
    return [keep(x, where) for x in arrays]


def _weighted(
    caller: str,
    direction: Array,
    student: Array,
    teacher: Array,
    cosine: ScalarLike,
    smooth_l1: ScalarLike,
    mse: ScalarLike,
    beta: ScalarLike,
    where: Array | None,
) -> Float[Array, "*batch"]:
    """Returns the weighted sum of the three terms."""
    _checks.not_negative(caller, cosine=cosine, smooth_l1=smooth_l1, mse=mse)
    _checks.positive(caller, beta=beta)
    told = {"batch_dims": direction.ndim, "where": where}
    terms = (
        (cosine, direction),
        (smooth_l1, smooth_l1_loss(student, teacher, beta=beta, **told)),
        (mse, hint_loss(student, teacher, **told)),
    )
    # A term without weight is left out: 0 * inf would be nan.
    used = [(w, x) for w, x in terms if _checks.is_array(w) or w != 0]
    weighted = (jnp.asarray(w, x.dtype) * x for w, x in used)
    return sum(weighted, start=jnp.zeros_like(direction))
