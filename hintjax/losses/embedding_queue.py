"""Similarities to a queue of embeddings (SEED, lightly), and between positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, keep, unit
from hintjax.losses._positions import check_maps
from hintjax.losses.attention_scores import over_keys, over_queries
from hintjax.losses.kd import divergence

HIGHEST = jax.lax.Precision.HIGHEST


def queue_similarity_loss(
    student: Float[Array, "*batch d"],
    teacher: Float[Array, "*batch d"],
    queue: Float[Array, "k d"],
    *,
    temperature: ScalarLike = 0.07,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Similarity to a queue of the teacher's embeddings (SEED): where an example lies.

    L = sum_k p_k (log p_k - log q_k)
    p = softmax_k(cos(t, Q_k) / T),  q = softmax_k(cos(s, Q_k) / T)

    Args:
        student: embeddings of the student, after a regressor to the teacher's width.
        teacher: embeddings of the teacher.
        queue: earlier embeddings of the teacher, of norm 1 (`hintjax.memory.enqueue`).
            A row of zeros has the similarity 0 to every example. No gradient passes.
        temperature: T > 0. A traced value is not checked.
        where: mask of the examples that count.

    Returns:
        The divergence of each example, >= 0 up to rounding, in nats; 0 for a masked
        example.

    Convention:
        `.mean()` is the value that lightly-train prints for its first version, without
        a factor T^2. lightly puts the batch into the queue before the loss. SEED takes
        the cross-entropy, which is larger by the teacher's entropy, with T = 0.01 for
        the teacher and 0.2 for the student.

    >>> queue = jnp.eye(3)
    >>> queue_similarity_loss(queue[:1], queue[1:2], queue, temperature=1.0)
    Array([0.364...], dtype=float32)

    References:
        Fang et al.: SEED: Self-supervised Distillation for Visual Representation, 2021.
        https://arxiv.org/abs/2101.04731
        https://github.com/lightly-ai/lightly-train (distillation_loss.py)
    """
    caller = "queue_similarity_loss"
    student, teacher, queue = as_float(caller, student, teacher, queue)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.rank(caller, 1, "*batch d", student=student)
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.positive(caller, temperature=temperature)
    _checks.mask(caller, where, student.shape[:-1])
    if queue.ndim != 2 or queue.shape[1] != student.shape[-1]:
        wanted = f"queue to be (k, {student.shape[-1]})"
        raise _checks.Refusal(_checks.message(caller, wanted, f"{queue.shape}"))
    queue = jax.lax.stop_gradient(queue)
    temperature = jnp.asarray(temperature, student.dtype)

    def spread(x: Array) -> Array:
        cosines = jnp.matmul(unit(keep(x, where)), queue.T, precision=HIGHEST)
        return jax.nn.log_softmax(cosines / temperature)

    return keep(divergence(spread(teacher), spread(student)), where)


def position_similarity_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape2"],
    *,
    temperature: ScalarLike = 0.07,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Similarity between positions: which parts of an image are alike.

    L = mean_i sum_j p_ij (log p_ij - log q_ij),  p_i = softmax_j(cos(t_i, t_j) / T)

    i and j run over the positions of one example that count, j = i included; q is the
    distribution of the student.

    Args:
        student: features of the student, (*batch *positions c), such as tokens or maps.
        teacher: features of the teacher at the same positions, of any width.
        temperature: T > 0. A traced value is not checked.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions that count.

    Returns:
        One value >= 0, up to rounding, per example, in nats; 0 for a fully masked
        example, and for one position.

    Convention:
        `.mean()` is the local loss of lightly-train's third version, which has weight 1
        beside the loss of its first version. Memory grows with the square of the number
        of positions.

    >>> student, teacher = jnp.ones((1, 2, 3)), jnp.eye(2)[None]
    >>> position_similarity_loss(student, teacher, temperature=1.0)
    Array([0.1109...], dtype=float32)

    References:
        https://github.com/lightly-ai/lightly-train (distillationv3_loss.py)
    """
    caller = "position_similarity_loss"
    student, teacher = as_float(caller, student, teacher)
    check_maps(caller, batch_dims, student=student, teacher=teacher)
    _checks.same_leading(caller, 1, student=student, teacher=teacher)
    _checks.positive(caller, temperature=temperature)
    batch, places = student.shape[:batch_dims], student.shape[:-1]
    _checks.mask(caller, where, batch, places)
    tokens = None
    if where is not None:
        tokens = jnp.expand_dims(where, tuple(range(where.ndim, len(places))))
        tokens = jnp.broadcast_to(tokens, places).reshape(*batch, -1)
    temperature = jnp.asarray(temperature, student.dtype)

    def spread(x: Array) -> Array:
        x = unit(keep(x, where)).reshape(*batch, 1, -1, x.shape[-1])
        cosines = jnp.einsum("...ic,...jc->...ij", x, x, precision=HIGHEST)
        return over_keys(cosines / temperature, tokens)

    return over_queries(divergence(spread(teacher), spread(student)), tokens)
