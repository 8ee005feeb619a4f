"""Channel-wise distillation (CWD): matches where each channel is active."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep
from hintjax.losses._positions import check_maps
from hintjax.losses.kd import divergence


def channel_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape c"],
    *,
    temperature: ScalarLike = 1.0,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Channel-wise distillation (CWD): each channel as a distribution over positions.

    L = T^2 mean_c sum_j p_jc (log p_jc - log q_jc),  p_:c = softmax_j(t_jc / T)

    j runs over the positions; q is the distribution of the student.

    Args:
        student: feature map, or map of logits, of the student, (*batch *positions c):
            a map (h w), a sequence or tokens (n), or a volume (d h w).
        teacher: map of the teacher, of the same shape.
        temperature: T > 0; a larger T shows more than the peaks. A traced value is not
            checked.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions (*batch *positions) that count.

    Returns:
        One value >= 0, up to rounding, per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that MMRazor prints. MMRazor weights it by 5, at T = 1,
        for the logit maps of segmentation networks.

    >>> student = jnp.zeros((1, 1, 2, 3))
    >>> channel_loss(student, student.at[:, :, 0].set(9.0))
    Array([0.69...], dtype=float32)

    References:
        Shu et al.: Channel-wise Knowledge Distillation for Dense Prediction, 2021.
        https://arxiv.org/abs/2011.13256
        https://github.com/open-mmlab/mmrazor (cwd.py)
    """
    caller = "channel_loss"
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    check_maps(caller, batch_dims, student=student)
    _checks.positive(caller, temperature=temperature)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    temperature = jnp.asarray(temperature, student.dtype)
    log_q, log_p = (
        _spread(x, temperature, batch_dims, where) for x in (student, teacher)
    )
    return temperature**2 * jnp.mean(divergence(log_p, log_q), -1)


def _spread(
    x: Array, temperature: ScalarLike, batch_dims: int, where: Array | None
) -> Array:
    """Returns each channel's log-distribution, (*batch, c, positions)."""
    x = keep(x, where) / temperature
    if where is not None:
        # Not -inf: the softmax of -inf alone is nan; with this value it is uniform.
        hidden = jnp.finfo(x.dtype).min / 2
        kept = jnp.expand_dims(where, tuple(range(where.ndim, x.ndim)))
        x = jnp.where(kept, x, hidden)
    x = x.reshape(*x.shape[:batch_dims], -1, x.shape[-1])
    return jax.nn.log_softmax(jnp.swapaxes(x, -1, -2))
