"""The scores of CRD: inner products of anchors with their candidates.

An anchor is an embedding of one network; its candidates are embeddings of the other
network: one positive and many negatives.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from hintjax import memory as banks
from hintjax._checks import labels
from hintjax.memory import HIGHEST, MemoryBank
from hintjax.methods._negatives import Drawn

Scores = tuple[Array, Array]  # (batch,) of the positives, (batch, K) of the negatives


class Embedded(NamedTuple):
    """The embeddings of a batch, of norm 1.

    Attributes:
        student: the student's embeddings.
        teacher: the teacher's embeddings.
    """

    student: Float[Array, "batch d"]
    teacher: Float[Array, "batch d"]


class Scored(NamedTuple):
    """The scores of a batch in both directions.

    Attributes:
        by_student: scores of the student's embeddings with those of the teacher.
        by_teacher: scores of the teacher's embeddings with those of the student.
        valid: True for a negative that counts; None if all count.
    """

    by_student: Scores
    by_teacher: Scores
    valid: Bool[Array, "batch k"] | None


def within(
    embedded: Embedded,
    label: Int[Array, " batch"],
    where: Bool[Array, " batch"] | None,
) -> Scored:
    """The scores within the batch; examples of other classes are the negatives."""
    student, teacher = embedded
    labels("crd", (len(student),), label=label)
    scores = jnp.matmul(student, teacher.T, precision=HIGHEST)
    valid = label[:, None] != label[None, :]
    if where is not None:
        valid &= where[None, :]
    own = jnp.diagonal(scores)
    return Scored((own, scores), (own, scores.T), valid)


def with_bank(
    embedded: Embedded,
    bank: MemoryBank,
    drawn: Drawn,
    positives: Int[Array, " batch"],
    train: bool,
    mesh: Mesh | None,
) -> Scored:
    """The scores with rows of the bank.

    Args:
        embedded: the embeddings of the batch.
        bank: the bank.
        drawn: the negatives, as rows of the bank.
        positives: the positives, as rows of the bank.
        train: whether the positives are in the bank. In evaluation the examples of the
            batch are not in the bank: the positives are the embeddings of the batch.
        mesh: the mesh over which the rows of the bank are sharded, if any.
    """
    (s, t), index = embedded, drawn.index
    own, others = embedded, (bank.student, bank.teacher)
    if train and mesh is not None and index.ndim == 2:
        index = jnp.concatenate([positives[:, None], index], 1)
        by_student = _of_rows(s, others[1], index, mesh)
        by_teacher = _of_rows(t, others[0], index, mesh)
        return Scored(by_student, by_teacher, drawn.valid)
    if train:
        own = banks.batch_rows(bank, positives, mesh=mesh)
    if index.ndim == 1:
        others = banks.shared_rows(bank, index, mesh=mesh)
    by_student = _of_candidates(s, own[1], others[1], index, mesh)
    by_teacher = _of_candidates(t, own[0], others[0], index, mesh)
    return Scored(by_student, by_teacher, drawn.valid)


def _of_rows(
    anchors: Float[Array, "batch d"],
    bank: Float[Array, "n d"],
    index: Int[Array, "batch k"],
    mesh: Mesh,
) -> Scores:
    """Scores where the positives are the first candidates of a sharded bank."""
    vectors = bank.astype(anchors.dtype)
    scores = banks.scores_by_rows(anchors, vectors, index, mesh=mesh)
    return scores[:, 0], scores[:, 1:]


def _of_candidates(
    anchors: Float[Array, "batch d"],
    positives: Float[Array, "batch d"],
    vectors: Float[Array, "n d"],
    index: Int[Array, "batch k"] | Int[Array, " k"],
    mesh: Mesh | None,
) -> Scores:
    """Scores of anchors with the other network's embeddings.

    Args:
        anchors: one network's embeddings.
        positives: the other network's embedding for each anchor.
        vectors: the other network's embeddings: the shared negatives, or the whole
            bank.
        index: (K,) for shared negatives; (batch, K), rows of the bank, otherwise.
        mesh: the mesh over which the rows of the bank are sharded, if any.
    """
    vectors = vectors.astype(anchors.dtype)
    own = jnp.sum(anchors * positives.astype(anchors.dtype), -1)
    if index.ndim == 1:
        return own, jnp.matmul(anchors, vectors.T, precision=HIGHEST)
    if mesh is not None:
        return own, banks.scores_by_rows(anchors, vectors, index, mesh=mesh)
    if all_scored(vectors.shape[0], index.shape[1]):
        scores = jnp.matmul(anchors, vectors.T, precision=HIGHEST)
        return own, jnp.take_along_axis(scores, index, 1)
    gathered = vectors[index]
    return own, jnp.einsum("bd,bkd->bk", anchors, gathered, precision=HIGHEST)


def all_scored(size: int, count: int) -> bool:
    """Whether it is cheaper to score the whole bank than to gather candidates."""
    return size <= 4 * count
