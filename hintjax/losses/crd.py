"""Contrastive distillation (CRD): identifies an example by its embeddings."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep, raise_float

EPSILON = 1e-7  # added to K / n, as in the authors' code


def contrastive_loss(
    student: Float[Array, "*batch d"],
    teacher: Float[Array, "*batch candidates d2"],
    *,
    size: int,
    log_constant: ScalarLike,
    temperature: float = 0.07,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Contrastive loss (CRD), one direction: find the anchor's positive.

    L = -log(P_0 / (P_0 + c)) - sum_k log((K/n) / (P_k + c))

    with P_k = exp(s . t_k / T) / Z, where k = 0 is the positive and k = 1..K are the
    negatives, and c = K/n + 1e-7. The loss is computed as
    softplus(-u_0) + sum_k softplus(u_k) + K log(c n/K) with
    u = s . t / T - log Z - log c; this form neither overflows nor takes log of 0.

    Args:
        student: embeddings of the anchors, of norm 1.
        teacher: the other network's embeddings of the candidates, positive first.
        size: n, the number of training examples.
        log_constant: log Z; see `contrastive_log_constant`.
        temperature: T, > 0.
        where: mask of the examples that count.

    Returns:
        One value > 0 per anchor; 0 for a masked anchor.

    Convention:
        `.mean()` is the `contrast_loss` of the authors' code, for one direction. CRD is
        the sum of two directions: student anchors with teacher candidates, and teacher
        anchors with student candidates, each with its own Z. The usual weight of the
        sum is 0.8.

    >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[[1.0, 0], [0, 1]]])
    >>> contrastive_loss(student, teacher, size=2, log_constant=0.0, temperature=1.0)
    Array([1.26746], dtype=float32)

    References:
        Tian et al.: Contrastive Representation Distillation, 2020, Eq. 10-19.
        https://arxiv.org/abs/1910.10699
        https://github.com/HobbitLong/RepDistiller (crd/criterion.py, crd/memory.py)
    """
    caller = "contrastive_loss"
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 1, "*batch d", student=student)
    _checks.rank(caller, 2, "*batch candidates d", teacher=teacher)
    shapes = student.shape, teacher.shape
    if shapes[0] != (*shapes[1][:-2], *shapes[1][-1:]):
        wanted = "student (*batch d) and teacher (*batch candidates d)"
        got = f"student {shapes[0]} and teacher {shapes[1]}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    _checks.mask(caller, where, student.shape[:-1])
    student, teacher = keep(student, where), keep(teacher, where)
    scores = jnp.einsum(
        "...d,...kd->...k", student, teacher, precision=jax.lax.Precision.HIGHEST
    )
    return contrastive_scores_loss(
        scores[..., 0],
        scores[..., 1:],
        size=size,
        log_constant=log_constant,
        temperature=temperature,
        where=where,
    )


def contrastive_scores_loss(
    positive: Float[Array, "*batch"],
    negatives: Float[Array, "*batch k"],
    *,
    size: int,
    log_constant: ScalarLike,
    temperature: float = 0.07,
    valid: Bool[Array, "*batch k"] | None = None,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Contrastive loss (CRD) of scores: `contrastive_loss` after the inner products.

    Use it if anchors share candidates: their embeddings need no copy for each anchor.

    Args:
        positive: score of each anchor with its positive.
        negatives: scores of each anchor with its negatives.
        size: n, the number of training examples.
        log_constant: log Z.
        temperature: T, > 0.
        valid: mask of the negatives that count, for example the negatives of other
            classes. K is then the number of the anchor's valid negatives.
        where: mask of the examples that count.

    Returns:
        One value > 0 per anchor; 0 for a masked anchor.

    Convention:
        The same as that of `contrastive_loss`.

    >>> positive, negatives = jnp.array([1.0]), jnp.array([[0.0, 9.0]])
    >>> valid = jnp.array([[True, False]])
    >>> contrastive_scores_loss(
    ...     positive, negatives, size=2, log_constant=0.0, temperature=1.0, valid=valid
    ... )
    Array([1.26746], dtype=float32)
    """
    caller = "contrastive_scores_loss"
    positive, negatives = raise_float(caller, positive, negatives)
    _check_scores(caller, positive, negatives, valid, where)
    _checks.positive(caller, temperature=temperature, size=size)
    known = "to be a number"
    _checks.scalar(
        caller, known, lambda z: not math.isnan(z), log_constant=log_constant
    )
    dtype = positive.dtype
    if valid is None:
        count = jnp.asarray(negatives.shape[-1], dtype)
    else:
        count = valid.sum(-1).astype(dtype)
        negatives = keep(negatives, valid)
    share = count / size
    shift = jnp.asarray(log_constant, dtype) + jnp.log(share + EPSILON)
    attract = jax.nn.softplus(shift - keep(positive, where) / temperature)
    spread = shift if shift.ndim == 0 else shift[..., None]
    repel = jax.nn.softplus(keep(negatives, where) / temperature - spread)
    if valid is not None:
        repel = jnp.where(valid, repel, 0)
    # log(c n / K) for each negative; K is at least 1 if an anchor has negatives.
    least = count * jnp.log1p(EPSILON * size / jnp.maximum(count, 1))
    return keep(attract + repel.sum(-1) + least, where)


def contrastive_log_constant(
    positive: Float[Array, "*batch"],
    negatives: Float[Array, "*batch k"],
    *,
    size: int,
    temperature: float = 0.07,
    valid: Bool[Array, "*batch k"] | None = None,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Logarithm of CRD's constant Z, estimated from a batch of scores.

    Z = n mean exp(score / T), over the anchors and all their candidates

    It is computed as a logsumexp, so no temperature overflows. Z is stored state, so it
    has no gradient. Scores that are not finite do not count, because Z never changes
    later.

    Args:
        positive: score of each anchor with its positive.
        negatives: scores of each anchor with its negatives.
        size: n, the number of training examples.
        temperature: T, > 0.
        valid: mask of the negatives that count.
        where: mask of the examples that count.

    Returns:
        log Z.

    >>> float(contrastive_log_constant(jnp.zeros(2), jnp.zeros((2, 3)), size=1))
    0.0

    References:
        Wu et al.: Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination, 2018, section 3.2; Tian et al. 2020, code.
    """
    caller = "contrastive_log_constant"
    positive, negatives = raise_float(caller, positive, negatives)
    _check_scores(caller, positive, negatives, valid, where)
    _checks.positive(caller, temperature=temperature, size=size)
    positive, negatives = jax.lax.stop_gradient((positive, negatives))
    counts = [jnp.isfinite(positive), jnp.isfinite(negatives)]
    if valid is not None:
        counts[1] &= valid
    if where is not None:
        counts = [counts[0] & where, counts[1] & where[..., None]]
    sums = [
        jax.nn.logsumexp(jnp.where(counted, scores / temperature, -jnp.inf))
        for counted, scores in zip(counts, (positive, negatives), strict=True)
    ]
    number = sum(counted.sum().astype(positive.dtype) for counted in counts)
    return jnp.logaddexp(*sums) - jnp.log(jnp.maximum(number, 1)) + math.log(size)


def _check_scores(
    caller: str,
    positive: Array,
    negatives: Array,
    valid: Array | None,
    where: Array | None,
) -> None:
    """Raises unless the scores and masks have matching shapes."""
    if positive.shape != negatives.shape[:-1] or negatives.ndim < 1:
        wanted = "positive (*batch) and negatives (*batch k)"
        got = f"positive {positive.shape} and negatives {negatives.shape}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    _checks.mask(caller, valid, negatives.shape, name="valid")
    _checks.mask(caller, where, positive.shape)
