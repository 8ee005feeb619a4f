"""CRD: contrastive representation distillation (Tian et al. 2020)."""

import typing
from dataclasses import dataclass
from types import NoneType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from hintjax import memory as banks
from hintjax import regressors
from hintjax._checks import Refusal, instance, message, positive, positive_int, scalar
from hintjax._numerics import either, masked_mean
from hintjax.losses import contrastive_log_constant, contrastive_scores_loss
from hintjax.method import Method, hints_of

HIGHEST = jax.lax.Precision.HIGHEST


class Drawn(NamedTuple):
    """Candidates from the bank.

    Attributes:
        index: the negatives: of each anchor, or of all anchors.
        valid: those that are of another class than the anchor.
        positive: the positives if they come with the negatives.
    """

    index: Int[Array, "batch k"] | Int[Array, " k"]
    valid: Bool[Array, "batch k"] | None
    positive: Int[Array, " batch"] | None = None


# Dataclasses, because tuples of different kinds with equal entries are equal.
@dataclass(frozen=True)
class AnchorNegatives:
    """The paper's negatives: each anchor draws its own from the other classes.

    Attributes:
        number: K, how many per anchor.
    """

    number: int = 16384

    def draw(self, classes, key, batch) -> Drawn:
        """Indices (batch, K)."""
        keys = _keys(key, batch["index"])
        return Drawn(*banks.draw_others(classes, keys, batch["label"], self.number))


@dataclass(frozen=True)
class SharedNegatives:
    """All anchors of a batch share one draw; those of its own class do not count.

    Scores are one matrix product with K embeddings, instead of batch x K gathered
    ones. An anchor's K (in its c) is the number that counts for it.

    Attributes:
        number: how many are drawn.
    """

    number: int = 16384

    def draw(self, classes, key, batch) -> Drawn:
        """Indices (K,)."""
        return Drawn(*banks.draw_shared(classes, key, batch["label"], self.number))


@dataclass(frozen=True)
class GivenNegatives:
    """Candidates that the batch brings along, as the published loader does.

    Attributes:
        name: of the batch's entry, int (batch, 1 + K): the positive, then negatives.
    """

    name: str = "candidates"

    def draw(self, classes, key, batch) -> Drawn:
        """Indices (batch, K) and positives."""
        if self.name not in batch:
            wanted = f'an entry "{self.name}" of the batch'
            raise Refusal(message("crd", wanted, f"{sorted(batch)}"))
        given = batch[self.name]
        return Drawn(given[:, 1:], None, given[:, 0])


@dataclass(frozen=True)
class BatchNegatives:
    """The batch's own examples of other classes; there is no bank.

    Both embeddings of a pair are of this step, so both heads learn from each score.
    """


Negatives = AnchorNegatives | SharedNegatives | GivenNegatives | BatchNegatives
KINDS = typing.get_args(Negatives)
PAPER = AnchorNegatives()


def crd(
    pair: tuple[str, str],
    *,
    negatives: Negatives = PAPER,
    temperature: float = 0.07,
    momentum: float = 0.5,
    feature_dim: int = 128,
    relax: bool = False,
    mesh: Mesh | None = None,
) -> Method:
    """CRD: an example's two embeddings find each other among those of other classes.

    Two linear heads embed the student's and the teacher's features on a sphere
    (`hintjax.regressors.Embedding`). A memory bank remembers every training
    example's embeddings. Each embedding is told apart (`contrastive_loss`) from the
    other network's in the bank; both directions are summed.

    The field pairs the pooled features before the classifiers, at weight 0.8 beside
    the task; CRD+KD adds `kd(4.0)` at weight 1.

    In evaluation an example is not in the bank: its positive is the other network's
    embedding of it, and nothing moves. The constants Z are set by the first training
    batch; before that, evaluation uses the batch's own.

    Args:
        pair: (guided layer, hint layer), as paths; maps are averaged over positions.
        negatives: `AnchorNegatives` (the paper's; K embeddings per anchor are
            gathered, or all n scored if n <= 4 K), `SharedNegatives` (much
            cheaper), `GivenNegatives` or `BatchNegatives`. Draws are made on the
            device and with replacement, where the code's loader draws without.
        temperature: T of the scores, > 0.
        momentum: how much of the bank's entry is kept, in [0, 1].
        feature_dim: size of the embeddings.
        relax: the positive is drawn from the anchor's class (the code's `relax`),
            instead of being the same example (`exact`, the default).
        mesh: the stage's mesh: the rows of the bank are split over the devices that
            split the batch, and an example's are sent only where they live. Without
            it every device has the whole bank, and gets and writes the embeddings of
            the whole batch, which grows with the number of devices. By rows what a
            device sends hardly grows: for shared negatives twice the K of each bank,
            else the scores of its own anchors with both whole banks, twice.

    Returns:
        The method. It trains two heads, `student` and `teacher`; remembers the bank
        (`MemoryBank`) and the examples by class; reports `positive`, the mean cosine
        of the positives. Batches need "label" and "index"; a stage is initialised
        with `data=Data(labels)`.

    Raises:
        ValueError: for a temperature, momentum or size out of range, `relax` without
            draws, or (when a stage is initialised) without data.

    References:
        Tian, Krishnan, Isola 2020, Contrastive Representation Distillation.
    """
    positive("crd", temperature=temperature)
    positive_int("crd", feature_dim=feature_dim)
    scalar("crd", "in [0, 1]", lambda m: 0 <= m <= 1, momentum=momentum)
    instance("crd", KINDS, negatives=negatives)
    instance("crd", bool, relax=relax)
    instance("crd", (Mesh, NoneType), mesh=mesh)
    in_batch = isinstance(negatives, BatchNegatives)
    if relax and isinstance(negatives, BatchNegatives | GivenNegatives):
        do = "Draw negatives from the bank."
        wanted = "relax only where positives are drawn"
        raise Refusal(message("crd", wanted, f"{negatives}", do))
    if in_batch and mesh is not None:
        wanted = "mesh only where there is a bank"
        raise Refusal(message("crd", wanted, f"{negatives}"))
    student_wants, teacher_wants = hints_of("crd", [pair])
    guided, hint = pair
    head = regressors.Embedding(feature_dim)

    def init(key, student, teacher, data):
        if data is None:
            do = "Pass data=hintjax.Data(labels) to the stage's init."
            wanted = "the training set's labels"
            raise Refusal(message("crd", wanted, "no data", do))
        ours, theirs, bank = jax.random.split(key, 3)
        params = {
            "student": regressors.init(head, ours, student.hints[guided].shape)[0],
            "teacher": regressors.init(head, theirs, teacher.hints[hint].shape)[0],
        }
        return params, {
            "bank": banks.init(bank, 0 if in_batch else data.size, feature_dim, mesh),
            "classes": banks.by_class(jnp.asarray(data.labels)),
        }

    def apply(params, memory, student, teacher, batch, context):
        bank, classes = memory["bank"], memory["classes"]
        where, train = batch.get("where"), context.train
        s = head.apply({"params": params["student"]}, student.hints[guided])
        t = head.apply({"params": params["teacher"]}, teacher.hints[hint])
        if in_batch:
            by_student, by_teacher, valid = _within(s, t, batch["label"], where)
        else:
            draws, positives = jax.random.split(context.key)
            drawn = negatives.draw(classes, draws, batch)
            mine = drawn.positive
            if relax:
                keys = _keys(positives, batch["index"])
                mine = banks.draw_same(classes, keys, batch["label"])
            elif mine is None:
                mine = batch["index"]
            valid = drawn.valid
            # In evaluation the examples are not in the bank: their own are as they are.
            own, others = (s, t), (bank.student, bank.teacher)
            index = drawn.index
            if train and mesh is not None and index.ndim == 2:
                own = None, None
                index = jnp.concatenate([mine[:, None], index], 1)
            elif train:
                own = banks.batch_rows(bank, mine, mesh=mesh)
            if index.ndim == 1:
                others = banks.shared_rows(bank, index, mesh=mesh)
            by_student = _scores(s, own[1], others[1], index, mesh)
            by_teacher = _scores(t, own[0], others[0], index, mesh)

        values, constants = 0.0, []
        setting = {
            "size": classes.order.shape[0],
            "temperature": temperature,
            "valid": valid,
            "where": where,
        }
        for scores, stored in (
            (by_student, bank.student_constant),
            (by_teacher, bank.teacher_constant),
        ):
            estimate = contrastive_log_constant(*scores, **setting)
            constant = banks.set_once(stored, estimate)
            constants.append(constant)
            values = values + contrastive_scores_loss(
                *scores, log_constant=constant, **setting
            )
        if train:
            if not in_batch:
                # What is no number is not remembered. And since this reads the scores,
                # XLA writes the bank after it was read, in place and without a copy.
                known = jnp.isfinite(values)
                known = known if where is None else known & where
                bank = banks.update(
                    bank,
                    batch["index"],
                    s,
                    t,
                    momentum=momentum,
                    where=known,
                    mesh=mesh,
                )
            bank = bank._replace(
                student_constant=constants[0], teacher_constant=constants[1]
            )
        metrics = {"positive": masked_mean(by_student[0], where)}
        return values, {**memory, "bank": bank}, metrics

    def select(good, memory, before, batch):
        if in_batch:
            return either(good, memory, before)
        bank, index = memory["bank"], batch["index"]
        bank = banks.select(good, bank, before["bank"], index, mesh=mesh)
        return {**memory, "bank": bank}

    def split(memory):
        rows = banks.split_rows(memory["bank"], mesh)
        return {"bank": rows, "classes": PartitionSpec()}

    return Method(
        student_wants,
        teacher_wants,
        init,
        apply,
        split=split if mesh else None,
        select=select,
    )


def crd_bytes(
    negatives: Negatives, *, size: int, batch: int, feature_dim: int = 128
) -> dict[str, int]:
    """An estimate of the memory that CRD takes, in bytes of float32.

    Args:
        negatives: the kind of negatives; `GivenNegatives` count as the paper's.
        size: number of training examples.
        batch: batch size.
        feature_dim: size of the embeddings.

    Returns:
        "bank": both banks, kept; "step": what one step of both directions gathers and
        scores, freed after it.

    >>> crd_bytes(SharedNegatives(16384), size=50_000, batch=64)
    {'bank': 51200000, 'step': 25165824}
    >>> crd_bytes(BatchNegatives(), size=50_000, batch=64)
    {'bank': 0, 'step': 32768}
    """
    instance("crd_bytes", KINDS, negatives=negatives)
    positive_int("crd_bytes", size=size, batch=batch, feature_dim=feature_dim)
    if isinstance(negatives, BatchNegatives):
        return {"bank": 0, "step": 8 * batch * batch}
    count = getattr(negatives, "number", PAPER.number)
    if isinstance(negatives, SharedNegatives):
        gathered = count * feature_dim
    elif _all_scored(size, count):
        gathered = batch * size
    else:
        gathered = batch * count * feature_dim
    return {"bank": 8 * size * feature_dim, "step": 8 * (gathered + batch * count)}


def _keys(key: Array, index: Array) -> Array:
    """A key per example, whatever its place in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _within(student, teacher, label, where):
    """Scores (positive, negatives) of both directions within the batch."""
    scores = jnp.matmul(student, teacher.T, precision=HIGHEST)
    valid = label[:, None] != label[None, :]
    if where is not None:
        valid &= where[None, :]
    own = jnp.diagonal(scores)
    return (own, scores), (own, scores.T), valid


def _scores(anchors, positives, vectors, index, mesh):
    """Scores (positive, negatives) of anchors with the other network's embeddings.

    Args:
        anchors: one network's embeddings.
        positives: the other's for each anchor; None if they are the first candidates.
        vectors: the other's that all anchors share, or its whole bank.
        index: (K,) of shared ones; or (batch, K), which ones of the bank.
        mesh: the bank's rows are split over it.
    """
    vectors = vectors.astype(anchors.dtype)
    if positives is None:
        scores = banks.scores_by_rows(anchors, vectors, index, mesh=mesh)
        return scores[:, 0], scores[:, 1:]
    own = jnp.sum(anchors * positives.astype(anchors.dtype), -1)
    if index.ndim == 1:
        return own, jnp.matmul(anchors, vectors.T, precision=HIGHEST)
    if mesh is not None:
        return own, banks.scores_by_rows(anchors, vectors, index, mesh=mesh)
    if _all_scored(vectors.shape[0], index.shape[1]):
        scores = jnp.matmul(anchors, vectors.T, precision=HIGHEST)
        return own, jnp.take_along_axis(scores, index, 1)
    gathered = vectors[index]
    return own, jnp.einsum("bd,bkd->bk", anchors, gathered, precision=HIGHEST)


def _all_scored(size: int, count: int) -> bool:
    """Is it cheaper to score the whole bank than to gather the candidates?"""
    return size <= 4 * count
