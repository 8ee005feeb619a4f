"""Factor transfer (FT): matches paraphrased features."""

from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import absolute_power, masked_mean
from hintjax.losses._positions import on_one_grid
from hintjax.losses.attention import attention_map


def factor_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape2 c2"],
    *,
    power: int = 2,
    exponent: int = 1,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Factor transfer (FT): mean difference of the normalized factors.

    L = mean_j |q_j(s) - q_j(t)|^e,  q = attention_map of the factor

    Args:
        student: the student's factor, from its translator, (*batch *positions c).
        teacher: the teacher's factor, from its paraphraser; the larger of the two
            factors is averaged down to the size of the smaller.
        power: p of the attention map, an integer >= 1 (the code's p1).
        exponent: e, an integer >= 1 (the code's p2).
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that RepDistiller weights by 200. RepDistiller reduces a
        factor to one number for each position and then normalizes; the paper
        normalizes the whole factor and takes a sum.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[[0.0], [2.0]]])
    >>> factor_loss(student, student[:, ::-1])
    Array([1.], dtype=float32)

    References:
        Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor
        Transfer, 2018. https://arxiv.org/abs/1802.04977
        https://github.com/HobbitLong/RepDistiller (FT.py)
    """
    caller = "factor_loss"
    _checks.positive_int(caller, power=power, exponent=exponent)
    factors = on_one_grid(caller, batch_dims, where, student=student, teacher=teacher)
    ours, theirs = (
        attention_map(x, power=power, batch_dims=batch_dims, where=where)
        for x in factors
    )
    if where is not None and where.ndim > batch_dims:
        where = where.reshape(ours.shape)
    return masked_mean(absolute_power(ours - theirs, exponent), where, batch_dims)
