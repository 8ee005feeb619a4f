"""The memory bank of contrastive distillation: state, and pure functions of it.

`init` makes a bank; `update` gives the bank after a step, changed by what the step
embedded; `draw_*` choose candidates by class. All of it runs inside jit, on the device.

Draws are uniform and *with* replacement (the published loader draws without). What is
drawn for an example depends on the key and the example, not on its place in the batch.

On a mesh the rows of a bank may be split over the devices that split the batch. What a
step sends then hardly grows with their number: an example's rows are asked for, and
changed, only where they live (`batch_rows`, `update`); rows for all are summed
(`shared_rows`); and where each anchor has its own candidates, anchors are scored where
rows live (`scores_by_rows`). What they give equals what one device gives.
"""

import math
from functools import partial
from types import NoneType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from hintjax import _checks
from hintjax._numerics import either, unit
from hintjax.sharding import batch_axes, over_batch, shares

HIGHEST = jax.lax.Precision.HIGHEST
PIECES = 4  # of a device's anchors, scored one after another to save memory


class MemoryBank(NamedTuple):
    """One embedding of norm 1 per training example and network.

    Attributes:
        student: the student's embeddings.
        teacher: the teacher's embeddings.
        student_constant: log Z of the student's anchors; -inf until it is set.
        teacher_constant: log Z of the teacher's anchors; -inf until it is set.
    """

    student: Float[Array, "size features"]
    teacher: Float[Array, "size features"]
    student_constant: Float[Array, ""]
    teacher_constant: Float[Array, ""]


class Classes(NamedTuple):
    """The training examples by class: whole classes, one after another.

    Attributes:
        order: the examples, sorted by label.
        label: their labels.
    """

    order: Int[Array, " size"]
    label: Int[Array, " size"]


def init(
    key: Key[Array, ""], size: int, features: int = 128, mesh: Mesh | None = None
) -> MemoryBank:
    """A random bank: entries U(-a, a) with a = sqrt(3 / features), of norm about 1.

    Args:
        key: for the entries.
        size: number of training examples; 0 for none.
        features: size of an embedding.
        mesh: its devices can share the rows evenly: rows of zeros, which are never
            read, fill up the last share.

    Returns:
        The bank, without constants.
    """
    _checks.key("memory", 0, key=key)
    _checks.integer("memory", 0, size=size)
    _checks.positive_int("memory", features=features)
    _checks.instance("memory", (Mesh, NoneType), mesh=mesh)
    spare = 0 if mesh is None else -size % shares(mesh)
    bound = (3 / features) ** 0.5
    student, teacher = (
        jnp.pad(
            jax.random.uniform(key, (size, features), jnp.float32, -bound, bound),
            ((0, spare), (0, 0)),
        )
        for key in jax.random.split(key)
    )
    unset = jnp.full((), -jnp.inf, jnp.float32)
    return MemoryBank(student, teacher, unset, unset)


def update(
    bank: MemoryBank,
    index: Int[Array, " batch"],
    student: Float[Array, "batch features"],
    teacher: Float[Array, "batch features"],
    *,
    momentum: float = 0.5,
    where: Bool[Array, " batch"] | None = None,
    mesh: Mesh | None = None,
) -> MemoryBank:
    """The bank after a step: M[index] <- unit(momentum M[index] + (1 - momentum) v).

    No gradient passes. If an example stands in the batch twice, its last embedding
    counts, as in the code on a CPU, and here everywhere.

    Args:
        bank: the bank.
        index: which training examples the batch holds.
        student: their embeddings by the student.
        teacher: their embeddings by the teacher.
        momentum: how much is kept.
        where: the examples that count; the others write nothing.
        mesh: the bank's rows are split over it: each device writes its own.

    Returns:
        The new bank, with the same constants.

    >>> bank = init(jax.random.key(0), 4, 2)
    >>> vector = jnp.array([[0.6, 0.8]])
    >>> new = update(bank, jnp.array([1]), vector, vector, momentum=0.0)
    >>> new.teacher[1]
    Array([0.6, 0.8], dtype=float32)
    """
    _check("memory", bank, index, mesh)
    arrays = {"student": student, "teacher": teacher}
    for name, array in arrays.items():
        wanted = index.shape[0], bank.student.shape[1]
        if not _checks.is_array(array) or array.shape != wanted:
            got = _checks.described(array)
            text = _checks.message("memory", f"{name} to be {wanted}", got)
            raise ValueError(text)
    _checks.scalar("memory", "in [0, 1]", lambda m: 0 <= m <= 1, momentum=momentum)
    _checks.mask("memory", where, index.shape)
    if mesh is not None:
        return _updated_by_rows(bank, index, student, teacher, momentum, where, mesh)
    where = jnp.ones(index.shape, bool) if where is None else where
    writes = _last(index, where, jnp.arange(index.shape[0]), index, where)
    target = jnp.where(writes, index, bank.student.shape[0])

    def moved(vectors, embedded):
        rows = _mixed(vectors[index], embedded, momentum)
        return vectors.at[target].set(rows, mode="drop")

    return bank._replace(
        student=moved(bank.student, student), teacher=moved(bank.teacher, teacher)
    )


def _last(index, where, place, all_index, all_where):
    """Whether an example counts, and is the last that does of those with its index."""
    same = (index[:, None] == all_index[None, :]) & all_where[None, :]
    places = jnp.arange(all_index.shape[0])[None, :]
    return where & (jnp.max(jnp.where(same, places, -1), 1) == place)


def _mixed(rows, embedded, momentum):
    embedded = jax.lax.stop_gradient(embedded).astype(rows.dtype)
    return unit(momentum * rows + (1 - momentum) * embedded)


def _updated_by_rows(bank, index, student, teacher, momentum, where, mesh):
    split, homes = over_batch(mesh).spec, split_rows(bank, mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(homes, *[split] * 4), out_specs=homes)
    def local(bank, index, student, teacher, where):
        gather = partial(jax.lax.all_gather, axis_name=batch_axes(mesh), tiled=True)
        batch = index.shape[0]
        place = jax.lax.axis_index(batch_axes(mesh)) * batch + jnp.arange(batch)
        writes = _last(index, where, place, gather(index), gather(where))
        mail = _Mail(index, writes, bank.student.shape[0], mesh)

        def deliver(turn, vectors):
            row = mail.sent(turn, index, -1)
            embedded = (mail.sent(turn, student, 0), mail.sent(turn, teacher, 0))
            here, there = _mine(row, vectors[0], mesh)
            target = jnp.where(there, here, vectors[0].shape[0])
            return tuple(
                old.at[target].set(_mixed(old[here], new, momentum), mode="drop")
                for old, new in zip(vectors, embedded, strict=True)
            )

        rows = mail.rounds(deliver, (bank.student, bank.teacher))
        return bank._replace(student=rows[0], teacher=rows[1])

    where = jnp.ones(index.shape, bool) if where is None else where
    return local(bank, index, student, teacher, where)


class _Mail:
    """Examples and the devices where their rows live, inside a `shard_map`.

    Every device has the same room for letters to each other one: a few more than there
    are on average. What finds no room goes in the next round, so that nothing is lost
    however the rows are spread; of a shuffled batch hardly anything ever has to.
    """

    def __init__(self, index, chosen, size, mesh):
        n = shares(mesh)
        self.axes = batch_axes(mesh)
        mean = index.shape[0] / n
        self.room = min(index.shape[0], math.ceil(mean + 4 * mean**0.5 + 4))
        self.box = n * self.room
        self.home = index // size
        self.chosen = chosen & (self.home >= 0) & (self.home < n)
        same = self.chosen & (self.home[:, None] == self.home[None, :])
        self.turn = jnp.sum(jnp.tril(same, -1), 1)
        longest = jnp.max(jnp.where(self.chosen, self.turn + 1, 0))
        self.needed = -(-jax.lax.pmax(longest, self.axes) // self.room)

    def rounds(self, deliver, carried):
        """As many as are needed, which is the same number on all devices."""
        return jax.lax.fori_loop(0, self.needed, deliver, carried)

    def sent(self, turn, values, empty):
        """What the others sent here: (devices x room, ...)."""
        shape = self.box, *values.shape[1:]
        place, _ = self._place(turn)
        box = jnp.full(shape, empty, values.dtype).at[place].set(values, mode="drop")
        return self.exchanged(box)

    def exchanged(self, box):
        """Each device's part of the box, for what it has for this one."""
        return jax.lax.all_to_all(box, self.axes, 0, 0, tiled=True)

    def answered(self, turn, box, before):
        """The answers, each to who asked, and what was there for who did not."""
        place, now = self._place(turn)
        answers = self.exchanged(box)[jnp.minimum(place, self.box - 1)]
        return jnp.where(now[:, None], answers, before)

    def _place(self, turn):
        slot = self.turn - turn * self.room
        now = self.chosen & (slot >= 0) & (slot < self.room)
        return jnp.where(now, self.home * self.room + slot, self.box), now


def select(
    good: Bool[Array, ""],
    bank: MemoryBank,
    before: MemoryBank,
    index: Int[Array, " batch"],
    *,
    mesh: Mesh | None = None,
) -> MemoryBank:
    """The bank after a step if that was good, else as before it, bit for bit.

    Only the rows that the step can have changed are written, in place: a select
    between two whole banks would copy one. That is done where the batch is a quarter of
    the bank or more.

    Args:
        good: whether the step counts.
        bank: the bank after `update`.
        before: the bank before it.
        index: which training examples the batch held.
        mesh: the bank's rows are split over it: each device writes its own.

    Returns:
        The one or the other.

    >>> before = init(jax.random.key(0), 4, 2)
    >>> index, vector = jnp.array([1]), jnp.ones((1, 2))
    >>> bank = update(before, index, vector, vector)
    >>> bool((select(jnp.array(False), bank, before, index)[0] == before[0]).all())
    True
    """
    _check("memory", bank, index, mesh)
    if mesh is not None:
        return _selected_by_rows(good, bank, before, index, mesh)

    if 4 * index.shape[0] >= bank.student.shape[0]:
        return either(good, bank, before)  # cheaper than single rows of so short a bank

    def chosen(new, old):
        return new.at[index].set(jnp.where(good, new[index], old[index]))

    return MemoryBank(
        chosen(bank.student, before.student),
        chosen(bank.teacher, before.teacher),
        *either(good, bank[2:], before[2:]),
    )


def _selected_by_rows(good, bank, before, index, mesh):
    rows, homes = over_batch(mesh).spec, split_rows(bank, mesh)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), homes, homes, rows),
        out_specs=homes,
    )
    def local(good, bank, before, index):
        index = jax.lax.all_gather(index, batch_axes(mesh), tiled=True)
        # Of rows that live elsewhere come others in their place: chosen as well.
        return select(good, bank, before, _mine(index, bank.student, mesh)[0])

    return local(good, bank, before, index)


def split_rows(bank: MemoryBank, mesh: Mesh) -> MemoryBank:
    """The `PartitionSpec` of each part of a bank whose rows are split over a mesh."""
    rows, whole = over_batch(mesh).spec, PartitionSpec()
    return bank._replace(
        student=rows, teacher=rows, student_constant=whole, teacher_constant=whole
    )


def batch_rows(
    bank: MemoryBank, index: Int[Array, " batch"], *, mesh: Mesh | None = None
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """The two rows of each example of a batch: the student's and the teacher's.

    Args:
        bank: the bank.
        index: one training example for each of the batch.
        mesh: the bank's rows are split over it: they are sent by who has them.

    Returns:
        Rows, split like the batch.
    """
    if mesh is None:
        return bank.student[index], bank.teacher[index]
    split = over_batch(mesh).spec

    @partial(jax.shard_map, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 2)
    def local(student, teacher, index):
        mail = _Mail(index, jnp.ones(index.shape, bool), student.shape[0], mesh)

        def fetch(turn, found):
            asked, _ = _mine(mail.sent(turn, index, 0), student, mesh)
            return tuple(
                mail.answered(turn, rows[asked], before)
                for rows, before in zip((student, teacher), found, strict=True)
            )

        nothing = jnp.zeros((index.shape[0], student.shape[1]), student.dtype)
        nothing = jax.lax.pcast(nothing, batch_axes(mesh), to="varying")
        return mail.rounds(fetch, (nothing, nothing))

    return local(bank.student, bank.teacher, index)


def shared_rows(
    bank: MemoryBank, index: Int[Array, " k"], *, mesh: Mesh | None = None
) -> tuple[Float[Array, "k features"], Float[Array, "k features"]]:
    """The two rows of each of some examples, for all devices the same.

    Args:
        bank: the bank.
        index: the training examples.
        mesh: the bank's rows are split over it: each device adds those that it has.

    Returns:
        The student's rows and the teacher's.
    """
    if mesh is None:
        return bank.student[index], bank.teacher[index]
    split, whole = over_batch(mesh).spec, PartitionSpec()

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, split, whole),
        out_specs=(whole, whole),
    )
    def local(student, teacher, index):
        row, here = _mine(index, student, mesh)
        found = tuple(jnp.where(here[:, None], v[row], 0) for v in (student, teacher))
        return jax.lax.psum(found, batch_axes(mesh))

    return local(bank.student, bank.teacher, index)


def scores_by_rows(
    anchors: Float[Array, "batch features"],
    vectors: Float[Array, "rows features"],
    index: Int[Array, "batch k"],
    *,
    mesh: Mesh,
) -> Float[Array, "batch k"]:
    """Inner products of anchors with candidates of their own, rows split over a mesh.

    Every device scores the anchors of all with the rows that it has, in a matrix
    product, and sends each device the scores of its anchors. Of an anchor's scores with
    the whole bank those that were asked for are kept. No row leaves its device, and the
    scores that a device sends are as many on any number of devices; it holds those of a
    quarter of its anchors at a time. Gradients go the same ways back, to the anchors;
    the rows are stored state and get none.

    Args:
        anchors: embeddings, split like the batch.
        vectors: one of the bank's two arrays.
        index: candidates of each anchor.
        mesh: the mesh.

    Returns:
        One score per anchor and candidate; 0 for what is not in the bank.
    """
    split, axes = over_batch(mesh).spec, batch_axes(mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
    def local(anchors, vectors, index):
        pieces = math.gcd(anchors.shape[0], PIECES)
        some = (pieces, anchors.shape[0] // pieces)
        size = vectors.shape[0]

        def of_some(anchors, index):
            batch = anchors.shape[0]
            anchors = jax.lax.all_gather(anchors, axes, tiled=True)
            # Not with vectors.T, of which the gradient would keep a copy.
            scores = jnp.einsum("bd,rd->br", anchors, vectors, precision=HIGHEST)
            # From each device the block of these anchors, left as they come.
            scores = jax.lax.all_to_all(scores, axes, 0, 0, tiled=True)
            home, row = index // size, index % size
            block = jnp.where(home < 0, shares(mesh), home) * batch
            place = block + jnp.arange(batch)[:, None]
            return scores.at[place, row].get(mode="fill", fill_value=0)

        pair = (x.reshape(*some, x.shape[1]) for x in (anchors, index))
        return jax.lax.map(lambda pair: of_some(*pair), tuple(pair)).reshape(
            index.shape
        )

    return local(anchors, jax.lax.stop_gradient(vectors), index)


def _mine(index, vectors, mesh):
    """Rows of the bank as this device counts its own, and whether it has them."""
    size = vectors.shape[0]
    index = index - jax.lax.axis_index(batch_axes(mesh)) * size
    return jnp.clip(index, 0, size - 1), (index >= 0) & (index < size)


def set_once(stored: Float[Array, ""], computed: Float[Array, ""]) -> Float[Array, ""]:
    """A constant that the first batch sets, and that stays from then on."""
    return jnp.where(jnp.isneginf(stored), computed.astype(stored.dtype), stored)


def by_class(labels: Int[Array, " size"]) -> Classes:
    """Sorts the training examples by class.

    >>> by_class(jnp.array([1, 0, 1])).order
    Array([1, 0, 2], dtype=int32)
    """
    _checks.labels("by_class", None, labels=labels)
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)
    return Classes(order, labels[order])


def draw_others(
    classes: Classes,
    keys: Key[Array, " batch"],
    label: Int[Array, " batch"],
    count: int,
) -> tuple[Int[Array, "batch count"], Bool[Array, "batch count"]]:
    """Examples of other classes, for each anchor on its own.

    Args:
        classes: the training examples by class.
        keys: one key per anchor.
        label: the anchors' labels.
        count: how many for each.

    Returns:
        Indices, and whether they are of another class: all or, where there is no
        other class, none.
    """
    _checks.positive_int("draw_others", count=count)
    _check_draw("draw_others", classes, label)
    _checks.key("draw_others", 1, keys=keys)
    _checks.same_leading("draw_others", 0, keys=keys, label=label)
    start, own = _range(classes, label)
    others = classes.order.shape[0] - own

    def draw(key, start, own, others):
        drawn = jax.random.randint(key, (count,), 0, jnp.maximum(others, 1))
        return classes.order[drawn + jnp.where(drawn >= start, own, 0)]

    index = jax.vmap(draw)(keys, start, own, others)
    return index, jnp.broadcast_to((others > 0)[:, None], index.shape)


def draw_shared(
    classes: Classes, key: Key[Array, ""], label: Int[Array, " batch"], count: int
) -> tuple[Int[Array, " count"], Bool[Array, "batch count"]]:
    """Examples of any class, the same for all anchors.

    Args:
        classes: the training examples by class.
        key: the key.
        label: the anchors' labels.
        count: how many.

    Returns:
        Indices, and for each anchor whether they are of another class.
    """
    _checks.positive_int("draw_shared", count=count)
    _check_draw("draw_shared", classes, label)
    _checks.key("draw_shared", 0, key=key)
    drawn = jax.random.randint(key, (count,), 0, classes.order.shape[0])
    return classes.order[drawn], classes.label[drawn][None, :] != label[:, None]


def draw_same(
    classes: Classes, keys: Key[Array, " batch"], label: Int[Array, " batch"]
) -> Int[Array, " batch"]:
    """One example of each anchor's own class, itself included.

    Args:
        classes: the training examples by class.
        keys: one key per anchor.
        label: the anchors' labels.

    Returns:
        Indices.
    """
    _check_draw("draw_same", classes, label)
    _checks.key("draw_same", 1, keys=keys)
    _checks.same_leading("draw_same", 0, keys=keys, label=label)
    start, own = _range(classes, label)

    def draw(key, start, own):
        return classes.order[start + jax.random.randint(key, (), 0, own)]

    return jax.vmap(draw)(keys, start, own)


def _check(caller, bank, index, mesh):
    _checks.instance(caller, MemoryBank, bank=bank)
    _checks.instance(caller, (Mesh, NoneType), mesh=mesh)
    _checks.labels(caller, None, index=index)


def _check_draw(caller, classes, label):
    _checks.instance(caller, Classes, classes=classes)
    _checks.labels(caller, None, label=label)


def _range(classes, label):
    """Where each label's class begins in the order, and its size."""
    start = jnp.searchsorted(classes.label, label, side="left")
    return start, jnp.searchsorted(classes.label, label, side="right") - start
