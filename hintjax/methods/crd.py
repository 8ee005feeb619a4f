"""CRD: contrastive representation distillation (Tian et al. 2020)."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from hintjax import memory as banks
from hintjax import regressors
from hintjax._checks import (
    Refusal,
    described,
    instance,
    labels,
    message,
    needed,
    on_host,
    positive,
    positive_int,
    scalar,
)
from hintjax._numerics import either, masked_mean
from hintjax.losses import contrastive_log_constant, contrastive_scores_loss
from hintjax.method import Applied, Batch, Context, Data, Method, hints_of
from hintjax.methods._shapes import checked, examples
from hintjax.networks import Features

HIGHEST = jax.lax.Precision.HIGHEST
_INDEX = "It is the place of each example in the labels of hintjax.Data."
Scores = tuple[Array, Array]  # (batch,) of the positives, (batch, K) of the negatives


class Drawn(NamedTuple):
    """Candidates from the bank, as rows of the bank.

    Attributes:
        index: the negatives, for each anchor or shared by all anchors.
        valid: True for a negative of another class than its anchor; None if all are.
        positive: the positives, if they were given with the negatives.
    """

    index: Int[Array, "batch k"] | Int[Array, " k"]
    valid: Bool[Array, "batch k"] | None
    positive: Int[Array, " batch"] | None = None


# Dataclasses, because tuples of different kinds with equal entries are equal.
@dataclass(frozen=True)
class AnchorNegatives:
    """The paper's negatives: each anchor draws its own from the other classes.

    Attributes:
        number: K, the number of negatives per anchor.
    """

    number: int = 16384

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Draws indices (batch, K)."""
        keys = _keys(key, _index(batch))
        return Drawn(*banks.draw_others(classes, keys, _label(batch), self.number))


@dataclass(frozen=True)
class SharedNegatives:
    """All anchors of a batch share one draw; an anchor's own class is left out.

    The scores are one matrix product with K embeddings; `AnchorNegatives` gathers
    batch x K embeddings. For each anchor, K (in its constant c) is the number of
    negatives that are valid for this anchor.

    Attributes:
        number: the number of negatives that are drawn.
    """

    number: int = 16384

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Draws indices (K,)."""
        return Drawn(*banks.draw_shared(classes, key, _label(batch), self.number))


@dataclass(frozen=True)
class GivenNegatives:
    """Candidates that are given in the batch, as in the published loader.

    Attributes:
        name: the name of the candidates in the batch, int (batch, 1 + K): the
            positive, then the negatives.
    """

    name: str = "candidates"

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Returns the given indices (batch, K), and the positives."""
        do = "Name the candidates with GivenNegatives(name)."
        given = needed("crd", batch, self.name, do)
        if given.ndim != 2 or not jnp.issubdtype(given.dtype, jnp.integer):
            wanted = f"{self.name} to be integer (batch, 1 + K)"
            raise Refusal(message("crd", wanted, described(given)))
        return Drawn(given[:, 1:], None, given[:, 0])


@dataclass(frozen=True)
class BatchNegatives:
    """The negatives are the batch's own examples of other classes; there is no bank.

    Both embeddings of a pair are computed in this step, so both heads learn from each
    score.
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
    (`hintjax.regressors.Embedding`). A memory bank stores both embeddings of every
    training example. The loss (`contrastive_loss`) contrasts each embedding with the
    other network's embeddings in the bank, and sums over both directions.

    The usual setting pairs the pooled features before the classifiers, at weight 0.8
    beside the task; CRD+KD adds `kd(4.0)` at weight 1.

    In evaluation an example is not in the bank: its positive is the other network's
    embedding of the same example, and the bank does not change. The first training
    batch sets the constants Z; before that, evaluation estimates them from its batch.

    Args:
        pair: (guided layer, hint layer), as paths; maps are averaged over positions.
        negatives: `AnchorNegatives` (the paper's; K embeddings per anchor are
            gathered, or all n embeddings are scored if n <= 4 K), `SharedNegatives`
            (much cheaper), `GivenNegatives` or `BatchNegatives`. Draws are made on the
            device, with replacement; the loader of the published code draws without
            replacement.
        temperature: the temperature T of the scores, > 0.
        momentum: the fraction of the bank's entry that an update keeps, in [0, 1].
        feature_dim: size of the embeddings.
        relax: draw the positive from the anchor's class (the code's `relax`). By
            default the positive is the same example (the code's `exact`).
        mesh: the stage's mesh. With it, the rows of the bank are sharded over the
            devices that shard the batch, and the embeddings of an example are sent only
            to the device with its row. Communication per device then hardly grows with
            the number of devices: it sends the K shared negatives of each bank twice,
            or, for other negatives, the scores of its own anchors with both whole
            banks twice. Without a mesh every device stores the whole bank, and receives
            and writes the embeddings of the whole batch, which grow with the number of
            devices.

    Returns:
        The method. It trains two heads, `student` and `teacher`; remembers the bank
        (`MemoryBank`) and the examples by class; reports `positive`, the mean cosine
        of the positives, and, if there is a bank, `outside`: the fraction of examples
        whose index is not in the training set. Such examples are not remembered. In
        training, methods that draw negatives also report `mislabeled`: the fraction of
        examples whose label is not that of their index in `Data(labels)`.
        Batches need "label" and "index"; a stage is initialized with
        `data=Data(labels)`.

    Raises:
        ValueError: if a temperature, momentum or size is out of range, if `relax` is
            set and nothing is drawn, or (when a stage is initialized) if there is no
            data, or only one class without `GivenNegatives`.

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
        wanted = "relax=True only with AnchorNegatives or SharedNegatives"
        raise Refusal(message("crd", wanted, f"{negatives}", do))
    if in_batch and mesh is not None:
        wanted = "mesh only with negatives that use the bank"
        raise Refusal(message("crd", wanted, f"{negatives}", "Leave out mesh=."))
    student_wants, teacher_wants = hints_of("crd", [pair])
    guided, hint = pair
    head = regressors.Embedding(feature_dim)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
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

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        bank, classes = memory["bank"], memory["classes"]
        where, train = batch.get("where"), context.train
        outside = None
        seen = (student.hints[guided], teacher.hints[hint])
        s, _ = regressors.apply(head, params["student"], {}, seen[0], train)
        t, _ = regressors.apply(head, params["teacher"], {}, seen[1], train)
        if isinstance(negatives, BatchNegatives):
            by_student, by_teacher, valid = _within(s, t, _label(batch), where)
        else:
            draws, positives = jax.random.split(context.key)
            drawn = negatives.draw(classes, draws, batch)
            outside = _outside(batch, limits(memory))
            mine = drawn.positive
            if relax:
                keys = _keys(positives, _index(batch))
                mine = banks.draw_same(classes, keys, _label(batch))
            elif mine is None:
                mine = _index(batch)
            valid = drawn.valid
            # In evaluation the examples are not in the bank: the positives are the
            # embeddings of this batch.
            own, others = (s, t), (bank.student, bank.teacher)
            index = drawn.index
            if train and mesh is not None and index.ndim == 2:
                index = jnp.concatenate([mine[:, None], index], 1)
                by_student = _scores_of_rows(s, others[1], index, mesh)
                by_teacher = _scores_of_rows(t, others[0], index, mesh)
            else:
                if train:
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
            if outside is not None:
                # The bank does not store embeddings whose loss is not finite. Since
                # this mask depends on the scores, XLA writes the bank after it has read
                # it, in place and without a copy.
                known = jnp.isfinite(values) & ~outside
                known = known if where is None else known & where
                bank = banks.update(
                    bank,
                    _index(batch),
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
        if outside is not None:
            metrics["outside"] = masked_mean(outside.astype(values.dtype), where)
        if train and by_index:
            wrong = mislabeled(memory, batch)
            metrics["mislabeled"] = masked_mean(wrong.astype(values.dtype), where)
        return values, {**memory, "bank": bank}, metrics

    def select(good: Array, memory: dict, before: dict, batch: Batch) -> dict:
        if in_batch:
            return either(good, memory, before)
        bank, index = memory["bank"], _index(batch)
        bank = banks.select(good, bank, before["bank"], index, mesh=mesh)
        return {**memory, "bank": bank}

    def check(data: Data) -> None:
        if not on_host(data.labels):
            return
        labels = np.asarray(data.labels)
        if labels.min() == labels.max():
            got = f"{data.size} labels of one class"
            do = "The negatives of an example are of other classes."
            raise Refusal(message("crd", "labels of several classes", got, do))

    def limits(memory: dict) -> dict[str, int]:
        size = memory["classes"].order.shape[0]
        named = [negatives.name] if isinstance(negatives, GivenNegatives) else []
        return {name: size for name in ("index", *named)}

    def mislabeled(memory: dict, batch: Batch) -> Array:
        classes, index = memory["classes"], _index(batch)
        known = (index >= 0) & (index < classes.order.shape[0])
        return known & ~banks.labeled(classes, index, _label(batch))

    # Batches with given negatives need no labels.
    by_index = isinstance(negatives, AnchorNegatives | SharedNegatives)
    method = Method(
        student_wants,
        teacher_wants,
        init,
        apply,
        split=None if mesh is None else partial(_split, mesh),
        select=select,
        check=None if isinstance(negatives, GivenNegatives) else check,
        limits=None if in_batch else limits,
        mislabeled=mislabeled if by_index else None,
    )
    few = examples(2) if in_batch else None
    return checked("crd", [pair], method, first=few)


def crd_bytes(
    negatives: Negatives, *, size: int, batch: int, feature_dim: int = 128
) -> dict[str, int]:
    """An estimate of the memory that CRD takes, in bytes of float32.

    Args:
        negatives: the kind of negatives. `GivenNegatives` are counted as the paper's
            16384 per anchor.
        size: number of training examples.
        batch: batch size.
        feature_dim: size of the embeddings.

    Returns:
        "bank": both banks, which stay in memory; "step": the gathered embeddings and
        the scores of both directions, which are freed after the step.

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


def _split(mesh: Mesh, memory: dict) -> dict:
    """`Method.split`: the rows of the bank are sharded over the mesh."""
    rows = banks.split_rows(memory["bank"], mesh)
    return {"bank": rows, "classes": PartitionSpec()}


def _outside(
    batch: Mapping[str, Array], limits: Mapping[str, int]
) -> Bool[Array, " batch"]:
    """Whether an example has a number outside of the limits."""
    found = [
        jnp.any((x < 0) | (x >= n), tuple(range(1, x.ndim)))
        for x, n in (
            (needed("crd", batch, name, _INDEX), n) for name, n in limits.items()
        )
    ]
    return jnp.any(jnp.stack(found), 0)


def _index(batch: Mapping[str, Array]) -> Int[Array, " batch"]:
    """The place of each example in the training set."""
    index = needed("crd", batch, "index", _INDEX)
    labels("crd", None, index=index)
    return index


def _label(batch: Mapping[str, Array]) -> Int[Array, " batch"]:
    """The class of each example."""
    label = needed("crd", batch, "label", "It is the class of each example.")
    labels("crd", None, label=label)
    return label


def _keys(key: Array, index: Array) -> Array:
    """A key per example that does not depend on its place in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _within(
    student: Float[Array, "batch d"],
    teacher: Float[Array, "batch d"],
    label: Int[Array, " batch"],
    where: Bool[Array, " batch"] | None,
) -> tuple[Scores, Scores, Bool[Array, "batch batch"]]:
    """Scores of both directions within the batch, and the mask of valid negatives."""
    labels("crd", (len(student),), label=label)
    scores = jnp.matmul(student, teacher.T, precision=HIGHEST)
    valid = label[:, None] != label[None, :]
    if where is not None:
        valid &= where[None, :]
    own = jnp.diagonal(scores)
    return (own, scores), (own, scores.T), valid


def _scores_of_rows(
    anchors: Float[Array, "batch d"],
    bank: Float[Array, "n d"],
    index: Int[Array, "batch k"],
    mesh: Mesh,
) -> Scores:
    """`_scores` where the positives are the first candidates of a sharded bank."""
    vectors = bank.astype(anchors.dtype)
    scores = banks.scores_by_rows(anchors, vectors, index, mesh=mesh)
    return scores[:, 0], scores[:, 1:]


def _scores(
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
    if _all_scored(vectors.shape[0], index.shape[1]):
        scores = jnp.matmul(anchors, vectors.T, precision=HIGHEST)
        return own, jnp.take_along_axis(scores, index, 1)
    gathered = vectors[index]
    return own, jnp.einsum("bd,bkd->bk", anchors, gathered, precision=HIGHEST)


def _all_scored(size: int, count: int) -> bool:
    """Whether it is cheaper to score the whole bank than to gather candidates."""
    return size <= 4 * count
