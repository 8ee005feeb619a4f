"""Self-attention: matches its scores (TinyBERT) or its distributions (MiniLM)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, masked_mean
from hintjax.losses.kd import divergence


def attention_score_loss(
    student: Float[Array, "*batch heads n n"],
    teacher: Float[Array, "*batch heads n n"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """TinyBERT attention loss: mean squared difference of the attention scores.

    L = mean_hij (a_hij(s) - a_hij(t))^2,  a = Q K^T / sqrt(d), before the softmax

    h runs over the heads, i over the queries and j over the keys that count.

    Args:
        student: scores of the student, without its padding mask. The mask puts scores
            at -1e4, or at -inf, in both networks; their difference would mean nothing
            or be nan.
        teacher: scores of the teacher, with the same numbers of heads and tokens.
        where: mask of the examples or tokens (*batch n) that count, both as queries
            and as keys.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the paper's L_attn, with weight 1 for each pair of layers. The
        authors' code sets low scores to 0 first (`attention_score_loss_code`).
        TextBrewer, given a mask, prints this number, but takes the mean over all pairs
        of tokens of a batch at once; here each example has the same weight, whatever
        its length.

    >>> student = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> attention_score_loss(student, jnp.zeros((1, 2, 2)))
    Array(7.5, dtype=float32)
    >>> where = jnp.array([True, False])
    >>> attention_score_loss(student, jnp.zeros((1, 2, 2)), where=where)
    Array(1., dtype=float32)

    References:
        Jiao et al.: TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
        https://arxiv.org/abs/1909.10351
        https://github.com/airaria/TextBrewer (losses.py, att_mse)
    """
    arrays = _scores("attention_score_loss", student, teacher, where)
    return _mean_square(*arrays, where)


def attention_score_loss_code(
    student: Float[Array, "*batch heads n n"],
    teacher: Float[Array, "*batch heads n n"],
    *,
    floor: ScalarLike = -100.0,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """TinyBERT attention loss as in the code: low scores count as 0.

    L = mean_hij (b_hij(s) - b_hij(t))^2,  b = a where a > floor, otherwise 0

    A network adds about -1e4, or -inf, to the scores of the keys that it must not see.
    This loss sets these scores to 0 in both networks, but they still count in the mean.

    Args:
        student: scores of the student, with the network's own mask applied.
        teacher: scores of the teacher, with the same numbers of heads and tokens.
        floor: scores at or below the floor become 0, without gradient.
        where: mask of the examples or tokens (*batch n) that count, both as queries
            and as keys.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the value that TinyBERT's code prints for each pair of layers, with
        its floor of -100. TextBrewer without a mask has a floor of -1e-3, which drops
        nearly all negative scores, perhaps half of all scores. `attention_score_loss`
        with `where` is correct, and is the default of the method.

    >>> student = jnp.array([[[1.0, -2e4], [3.0, -2e4]]])
    >>> attention_score_loss_code(student, jnp.zeros((1, 2, 2)))
    Array(2.5, dtype=float32)

    References:
        Jiao et al.: TinyBERT: Distilling BERT for Natural Language Understanding, 2020.
        https://github.com/huawei-noah/Pretrained-Language-Model (general_distill.py)
        https://github.com/airaria/TextBrewer (losses.py, att_mse)
    """
    caller = "attention_score_loss_code"
    arrays = _scores(caller, student, teacher, where)
    _checks.scalar(caller, "to be a number", lambda x: not math.isnan(x), floor=floor)
    student, teacher = (
        jnp.where(x <= jnp.asarray(floor, x.dtype), 0, x) for x in arrays
    )
    return _mean_square(student, teacher, where)


def attention_distribution_loss(
    student: Float[Array, "*batch heads n n"],
    teacher: Float[Array, "*batch heads n n"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """MiniLM attention transfer: divergence of the attention distributions.

    L = mean_hi sum_j p_hij (log p_hij - log q_hij),  p_hi = softmax_j(a_hij(t))

    h runs over the heads, i over the queries and j over the keys that count; q is the
    distribution of the student, and a are the scores before the softmax.

    Args:
        student: scores of the student.
        teacher: scores of the teacher, with the same numbers of heads and tokens. A
            score of -inf hides a key, as a causal mask does.
        where: mask of the examples or tokens (*batch n) that count, both as queries
            and as keys.

    Returns:
        One value >= 0, up to rounding, per example, in nats; 0 for a fully
        masked example.

    Convention:
        `.mean()` is the paper's L_AT, with weight 1, next to `relation_loss` of the
        values. Each example has the same weight, whatever its length.

    >>> teacher = jnp.array([[[9.0, 0.0], [0.0, 9.0]]])
    >>> attention_distribution_loss(jnp.zeros((1, 2, 2)), teacher)
    Array(0.69..., dtype=float32)

    References:
        Wang et al.: MiniLM: Deep Self-Attention Distillation for Task-Agnostic
        Compression of Pre-Trained Transformers, 2020. https://arxiv.org/abs/2002.10957
    """
    arrays = _scores("attention_distribution_loss", student, teacher, where)
    tokens = tokens_of(where, student.shape[:-3], student.shape[-1])
    log_q, log_p = (over_keys(_keep_pairs(x, tokens), tokens) for x in arrays)
    return over_queries(divergence(log_p, log_q), tokens)


def tokens_of(where: Array | None, batch: Sequence[int], n: int) -> Array | None:
    """Returns the mask of tokens (*batch, n) for a mask of examples or tokens."""
    if where is None or where.ndim > len(batch):
        return where
    return jnp.broadcast_to(where[..., None], (*batch, n))


def over_keys(scores: Array, tokens: Array | None) -> Array:
    """Returns each query's log-distribution over the keys that count."""
    if tokens is not None:
        # Not -inf: the softmax of -inf alone is nan; with this value it is uniform.
        hidden = jnp.finfo(scores.dtype).min / 2
        scores = jnp.where(tokens[..., None, None, :], scores, hidden)
    return jax.nn.log_softmax(scores)


def over_queries(values: Array, tokens: Array | None) -> Array:
    """Returns the mean of (*batch, heads, n) over heads and unmasked queries."""
    return masked_mean(jnp.mean(values, -2), tokens, values.ndim - 2)


def _scores(
    caller: str, student: Array, teacher: Array, where: Array | None
) -> tuple[Array, Array]:
    """Returns the checked scores of both networks."""
    student, teacher = as_float(caller, student, teacher)
    do = "Pair layers of equally many heads, or compare relations (hintjax.minilm)."
    _checks.rank(caller, 3, "*batch heads n n", student=student)
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    *batch, _, queries, keys = student.shape
    if queries != keys:
        got = f"student and teacher {student.shape}"
        raise _checks.Refusal(_checks.message(caller, "as many queries as keys", got))
    _checks.mask(caller, where, tuple(batch), (*batch, keys))
    return student, teacher


def pairs_of(tokens: Array) -> Array:
    """Returns the mask of the pairs (query, key) in which both tokens count."""
    return tokens[..., :, None] & tokens[..., None, :]


def _keep_pairs(x: Array, tokens: Array | None) -> Array:
    """Returns scores, or their differences, with 0 at masked pairs of tokens."""
    return x if tokens is None else jnp.where(pairs_of(tokens)[..., None, :, :], x, 0)


def _mean_square(student: Array, teacher: Array, where: Array | None) -> Array:
    """Returns the mean squared difference over heads and pairs of tokens."""
    tokens = tokens_of(where, student.shape[:-3], student.shape[-1])
    square = jnp.mean(jnp.square(_keep_pairs(student - teacher, tokens)), -3)
    pairs = None if tokens is None else pairs_of(tokens)
    return masked_mean(square, pairs, square.ndim - 2)
