"""Token relations (MiniLM, TextBrewer): matches relations between tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean
from hintjax.losses._positions import check_maps
from hintjax.losses.attention_scores import (
    over_keys,
    over_queries,
    pairs_of,
    tokens_of,
)
from hintjax.losses.kd import divergence


def relation_loss(
    student: Float[Array, "*batch n c"],
    teacher: Float[Array, "*batch n c2"],
    *,
    heads: int,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """MiniLM relation loss: divergence of the relations between tokens.

    L = mean_hi sum_j p_hij (log p_hij - log q_hij)
    p_hi = softmax_j(<t_hi, t_hj> / sqrt(d))

    t_hi is the h-th part of token i and has d numbers. h runs over the relation heads,
    i and j over the tokens that count; q is the distribution of the student.

    Args:
        student: queries, keys or values of the student, with all heads concatenated.
        teacher: queries, keys or values of the teacher; the same number of tokens, of
            any width.
        heads: number of relation heads, the parts into which both widths are cut. It
            must divide both widths, and is independent of the networks' own heads.
        where: mask of the examples or tokens (*batch n) that count.

    Returns:
        One value >= 0, up to rounding, per example, in nats; 0 for a fully
        masked example.

    Convention:
        `.mean()` is one term of MiniLMv2's sum, in which each term has weight 1. For
        the values, with the networks' own number of heads as `heads`, it is L_VR of
        MiniLM. Each example has the same weight, whatever its length.

    >>> student = jnp.zeros((2, 4))
    >>> relation_loss(student, jnp.array([[9.0, 0.0], [0.0, 9.0]]), heads=1)
    Array(0.69..., dtype=float32)

    References:
        Wang et al.: MiniLMv2: Multi-Head Self-Attention Relation Distillation for
        Compressing Pretrained Transformers, 2021. https://arxiv.org/abs/2012.15828
        Wang et al.: MiniLM, 2020. https://arxiv.org/abs/2002.10957
    """
    caller = "relation_loss"
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 2, "*batch n c", student=student, teacher=teacher)
    _checks.same_leading(caller, 1, student=student, teacher=teacher)
    _checks.positive_int(caller, heads=heads)
    *batch, n, _ = student.shape
    _checks.mask(caller, where, tuple(batch), (*batch, n))
    for name, x in {"student": student, "teacher": teacher}.items():
        if x.shape[-1] % heads:
            wanted = f"heads to divide the width of the {name}"
            got = f"{heads} heads and {name} {x.shape}"
            raise _checks.Refusal(_checks.message(caller, wanted, got))
    tokens = tokens_of(where, batch, n)
    log_q, log_p = (
        over_keys(_relations(keep(x, tokens), heads), tokens)
        for x in (student, teacher)
    )
    return over_queries(divergence(log_p, log_q), tokens)


def token_gram_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape c2"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Gram matrices of tokens: mean squared difference of their inner products.

    L = mean_ij (G_ij(s) - G_ij(t))^2,  G_ij(x) = <x_i, x_j> / c

    i and j run over the tokens that count. The division by the width c makes networks
    of different widths comparable. L is quartic in the activations: if student and
    teacher differ in scale, begin with a small weight.

    Args:
        student: hidden states of the student: tokens (*batch n c), or a map, whose
            positions are the tokens.
        teacher: hidden states of the teacher, at the same positions, of any width.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        TextBrewer's `mmd` of a layer with itself (a form of NST for tokens). TextBrewer
        takes the mean over all pairs of tokens of a batch at once; here each example
        has the same weight, whatever its length.

    >>> student = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])
    >>> token_gram_loss(student, jnp.zeros((1, 2, 3)))
    Array([0.25], dtype=float32)
    >>> where = jnp.array([[True, False]])
    >>> token_gram_loss(student, jnp.zeros((1, 2, 3)), where=where)
    Array([1.], dtype=float32)

    References:
        Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity
        Transfer, 2017. https://arxiv.org/abs/1707.01219
        https://github.com/airaria/TextBrewer (losses.py, mmd)
    """
    caller = "token_gram_loss"
    student, teacher = as_float(caller, student, teacher)
    check_maps(caller, batch_dims, student=student, teacher=teacher)
    _checks.same_leading(caller, 1, student=student, teacher=teacher)
    batch, places = student.shape[:batch_dims], student.shape[:-1]
    _checks.mask(caller, where, batch, places)

    def gram(x: Array) -> Array:
        x = keep(x, where).reshape(*batch, -1, x.shape[-1])
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("...ic,...jc->...ij", x, x, precision=highest) / x.shape[-1]

    squares = jnp.square(gram(student) - gram(teacher))
    if where is None:
        return masked_mean(squares, None, batch_dims)
    spread = jnp.expand_dims(where, range(where.ndim, len(places)))
    tokens = jnp.broadcast_to(spread, places)
    return masked_mean(squares, pairs_of(tokens.reshape(*batch, -1)), batch_dims)


def _relations(x: Array, heads: int) -> Array:
    """Returns scaled products of all pairs of tokens, (*batch, heads, n, n)."""
    x = x.reshape(*x.shape[:-1], heads, -1)
    x = x * jnp.asarray(x.shape[-1] ** -0.25, x.dtype)
    return jnp.einsum(
        "...ihd,...jhd->...hij", x, x, precision=jax.lax.Precision.HIGHEST
    )
