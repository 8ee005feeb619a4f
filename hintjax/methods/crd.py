"""CRD: contrastive representation distillation (Tian et al. 2020)."""

from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from hintjax import memory as banks
from hintjax import regressors
from hintjax._checks import (
    Refusal,
    instance,
    message,
    on_host,
    positive,
    positive_int,
    scalar,
)
from hintjax._numerics import either, masked_mean
from hintjax.losses import contrastive_log_constant, contrastive_scores_loss
from hintjax.memory import MemoryBank
from hintjax.method import Applied, Batch, Context, Data, Method, hints_of
from hintjax.methods._negatives import (
    KINDS,
    PAPER,
    AnchorNegatives,
    BatchNegatives,
    Drawing,
    Drawn,
    GivenNegatives,
    Negatives,
    SharedNegatives,
    index_of,
    keys_of,
    label_of,
    outside,
)
from hintjax.methods._scores import Embedded, Scored, all_scored, with_bank, within
from hintjax.methods._shapes import checked, examples
from hintjax.networks import Features


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
    _check_options(negatives, temperature, momentum, feature_dim, relax, mesh)
    wants = hints_of("crd", [pair])
    head = regressors.Embedding(feature_dim)
    made = _Crd(pair, negatives, temperature, momentum, head, relax, mesh)
    given = isinstance(negatives, GivenNegatives)
    method = Method(
        *wants,
        made.init,
        made.apply,
        split=None if mesh is None else partial(_split, mesh),
        select=made.select,
        check=None if given else _check_classes,
        limits=None if made.in_batch else made.limits,
        mislabeled=made.mislabeled if made.by_index else None,
    )
    few = examples(2) if made.in_batch else None
    return checked("crd", [pair], method, first=few)


class _Crd(NamedTuple):
    """The functions of the method; the attributes are arguments of `crd`.

    Attributes:
        pair: (guided layer, hint layer).
        negatives: the kind of negatives.
        temperature: temperature of the scores.
        momentum: the fraction of a row that an update keeps.
        head: the module of both heads.
        relax: whether the positive is drawn from the anchor's class.
        mesh: the mesh over which the rows of the bank are sharded, if any.
    """

    pair: tuple[str, str]
    negatives: Negatives
    temperature: float
    momentum: float
    head: regressors.Embedding
    relax: bool
    mesh: Mesh | None

    @property
    def in_batch(self) -> bool:
        """Whether the negatives are in the batch, so that there is no bank."""
        return isinstance(self.negatives, BatchNegatives)

    @property
    def by_index(self) -> bool:
        """Whether negatives are drawn by the labels; given negatives need no labels."""
        return isinstance(self.negatives, AnchorNegatives | SharedNegatives)

    def init(
        self, key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        """`Method.init`: both heads, the bank, and the examples by class."""
        if data is None:
            do = "Pass data=hintjax.Data(labels) to the stage's init."
            wanted = "the training set's labels"
            raise Refusal(message("crd", wanted, "no data", do))
        ours, theirs, bank = jax.random.split(key, 3)
        seen, size = self._seen(student, teacher), 0 if self.in_batch else data.size
        params = {
            "student": regressors.init(self.head, ours, seen[0].shape)[0],
            "teacher": regressors.init(self.head, theirs, seen[1].shape)[0],
        }
        return params, {
            "bank": banks.init(bank, size, self.head.features, self.mesh),
            "classes": banks.by_class(jnp.asarray(data.labels)),
        }

    def apply(
        self,
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        """`Method.apply`: embed, draw, score, lose, remember."""
        bank, where, train = memory["bank"], batch.get("where"), context.train
        embedded, unknown = self._embed(params, student, teacher, train), None
        if isinstance(self.negatives, BatchNegatives):
            scored = within(embedded, label_of(batch), where)
        else:
            drawn, positives = self._draw(self.negatives, memory, batch, context.key)
            unknown = outside(batch, self.limits(memory))
            scored = with_bank(embedded, bank, drawn, positives, train, self.mesh)
        values, constants = self._lose(scored, bank, _size(memory), where)
        if train:
            if unknown is not None:
                bank = self._remember(bank, embedded, batch, values, unknown)
            bank = MemoryBank(bank.student, bank.teacher, *constants)
        metrics = {"positive": masked_mean(scored.by_student[0], where)}
        if unknown is not None:
            metrics["outside"] = masked_mean(unknown.astype(values.dtype), where)
        if train and self.by_index:
            wrong = self.mislabeled(memory, batch)
            metrics["mislabeled"] = masked_mean(wrong.astype(values.dtype), where)
        return values, {**memory, "bank": bank}, metrics

    def select(self, good: Array, memory: dict, before: dict, batch: Batch) -> dict:
        """`Method.select`: a step that does not count leaves the bank as it was."""
        if self.in_batch:
            return either(good, memory, before)
        bank, index = memory["bank"], index_of(batch)
        bank = banks.select(good, bank, before["bank"], index, mesh=self.mesh)
        return {**memory, "bank": bank}

    def limits(self, memory: dict) -> dict[str, int]:
        """`Method.limits`: all numbers of a batch are places in the training set."""
        kind = self.negatives
        named = [kind.name] if isinstance(kind, GivenNegatives) else []
        return {name: _size(memory) for name in ("index", *named)}

    def mislabeled(self, memory: dict, batch: Batch) -> Bool[Array, " batch"]:
        """`Method.mislabeled`: labels that are not those of their index."""
        index, label = index_of(batch), label_of(batch)
        known = (index >= 0) & (index < _size(memory))
        return known & ~banks.labeled(memory["classes"], index, label)

    def _seen(self, student: Features, teacher: Features) -> tuple[Any, Any]:
        """The values of the guided layer and of the hint layer, or their shapes."""
        guided, hint = self.pair
        return student.hints[guided], teacher.hints[hint]

    def _embed(
        self, params: dict, student: Features, teacher: Features, train: bool
    ) -> Embedded:
        """The embeddings of a batch."""
        ours, theirs = self._seen(student, teacher)
        s, _ = regressors.apply(self.head, params["student"], {}, ours, train)
        t, _ = regressors.apply(self.head, params["teacher"], {}, theirs, train)
        return Embedded(s, t)

    def _draw(
        self, negatives: Drawing, memory: dict, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Drawn, Int[Array, " batch"]]:
        """The candidates of a batch, and its positives, as rows of the bank."""
        draws, positives = jax.random.split(key)
        drawn = negatives.draw(memory["classes"], draws, batch)
        if self.relax:
            keys = keys_of(positives, index_of(batch))
            return drawn, banks.draw_same(memory["classes"], keys, label_of(batch))
        if drawn.positive is not None:
            return drawn, drawn.positive
        return drawn, index_of(batch)

    def _lose(
        self,
        scored: Scored,
        bank: MemoryBank,
        size: int,
        where: Bool[Array, " batch"] | None,
    ) -> tuple[Float[Array, " batch"], list[Float[Array, ""]]]:
        """The loss of each example, and the constants of both directions."""
        setting = {
            "size": size,
            "temperature": self.temperature,
            "valid": scored.valid,
            "where": where,
        }
        values, constants = 0.0, []
        for scores, stored in (
            (scored.by_student, bank.student_constant),
            (scored.by_teacher, bank.teacher_constant),
        ):
            estimate = contrastive_log_constant(*scores, **setting)
            constants.append(banks.set_once(stored, estimate))
            values = values + contrastive_scores_loss(
                *scores, log_constant=constants[-1], **setting
            )
        return values, constants

    def _remember(
        self,
        bank: MemoryBank,
        embedded: Embedded,
        batch: Batch,
        values: Float[Array, " batch"],
        unknown: Bool[Array, " batch"],
    ) -> MemoryBank:
        """The bank with the embeddings of a batch.

        Embeddings whose loss is not finite are not stored. Since this mask depends on
        the scores, XLA writes the bank after it has read it, in place, without a copy.
        """
        known, where = jnp.isfinite(values) & ~unknown, batch.get("where")
        return banks.update(
            bank,
            index_of(batch),
            *embedded,
            momentum=self.momentum,
            where=known if where is None else known & where,
            mesh=self.mesh,
        )


def _split(mesh: Mesh, memory: dict) -> dict:
    """`Method.split`: the rows of the bank are sharded over the mesh."""
    rows = banks.split_rows(memory["bank"], mesh)
    return {"bank": rows, "classes": PartitionSpec()}


def _size(memory: dict) -> int:
    """The number of training examples."""
    return memory["classes"].order.shape[0]


def _check_classes(data: Data) -> None:
    """`Method.check`: raises if all labels are of one class."""
    if not on_host(data.labels):
        return
    labels = np.asarray(data.labels)
    if labels.min() == labels.max():
        got = f"{data.size} labels of one class"
        do = "The negatives of an example are of other classes."
        raise Refusal(message("crd", "labels of several classes", got, do))


def _check_options(
    negatives: Negatives,
    temperature: float,
    momentum: float,
    feature_dim: int,
    relax: bool,
    mesh: Mesh | None,
) -> None:
    """Raises if an argument of `crd` is wrong, or two arguments contradict."""
    positive("crd", temperature=temperature)
    positive_int("crd", feature_dim=feature_dim)
    scalar("crd", "in [0, 1]", lambda m: 0 <= m <= 1, momentum=momentum)
    instance("crd", KINDS, negatives=negatives)
    instance("crd", bool, relax=relax)
    instance("crd", (Mesh, NoneType), mesh=mesh)
    if relax and isinstance(negatives, BatchNegatives | GivenNegatives):
        do = "Draw negatives from the bank."
        wanted = "relax=True only with AnchorNegatives or SharedNegatives"
        raise Refusal(message("crd", wanted, f"{negatives}", do))
    if isinstance(negatives, BatchNegatives) and mesh is not None:
        wanted = "mesh only with negatives that use the bank"
        raise Refusal(message("crd", wanted, f"{negatives}", "Leave out mesh=."))


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
    elif all_scored(size, count):
        gathered = batch * size
    else:
        gathered = batch * count * feature_dim
    return {"bank": 8 * size * feature_dim, "step": 8 * (gathered + batch * count)}
