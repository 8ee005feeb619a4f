"""The memory bank of contrastive distillation: state, and pure functions of it.

`init` makes a bank; `update` gives the bank after a step, changed by what the step
embedded; `draw_*` choose candidates by class. All of it runs inside jit, on the device.

Draws are uniform and *with* replacement (the published loader draws without). What is
drawn for an example depends on the key and the example, not on its place in the batch.

On a mesh the rows of a bank may be split over the devices that split the batch.
`scores_by_rows` and `update` then bring embeddings to where rows live, never rows to
embeddings; what they give equals what one device gives.
"""

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
    batch = jnp.arange(index.shape[0])
    same = index[:, None] == index[None, :]
    if where is not None:
        same &= where[None, :]
    # All of one example's rows write the same value; -1 (none counts) writes nowhere.
    last = jnp.max(jnp.where(same, batch[None, :], -1), 1)
    target = jnp.where(last < 0, bank.student.shape[0], index)

    def moved(vectors, embedded):
        embedded = jax.lax.stop_gradient(embedded).astype(vectors.dtype)
        rows = momentum * vectors[index] + (1 - momentum) * embedded[last]
        return vectors.at[target].set(unit(rows), mode="drop")

    return bank._replace(
        student=moved(bank.student, student), teacher=moved(bank.teacher, teacher)
    )


def _updated_by_rows(bank, index, student, teacher, momentum, where, mesh):
    rows = over_batch(mesh).spec
    homes = split_rows(bank, mesh)

    @partial(jax.shard_map, mesh=mesh, in_specs=(homes, *[rows] * 4), out_specs=homes)
    def local(bank, *batch):
        gather = partial(jax.lax.all_gather, axis_name=batch_axes(mesh), tiled=True)
        index, student, teacher, where = map(gather, batch)
        index, here = _mine(index, bank.student, mesh)
        return update(
            bank, index, student, teacher, momentum=momentum, where=where & here
        )

    where = jnp.ones(index.shape, bool) if where is None else where
    return local(bank, index, student, teacher, where)


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
    between two whole banks would copy one.

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


def scores_by_rows(
    anchors: Float[Array, "batch features"],
    vectors: Float[Array, "rows features"],
    *indices: Int[Array, "batch _"] | Int[Array, " _"],
    mesh: Mesh,
) -> tuple[Float[Array, "batch _"], ...]:
    """Inner products of anchors with rows that are split over a mesh.

    The anchors of each device visit all devices in a ring, with what was asked for
    them. Where they are they get their scores with all rows that live there, in one
    matrix product, and keep those that were asked for. No row leaves its device, none
    is gathered, and a device never holds more than one device's scores. Gradients go
    to the anchors, in a second round; the rows are stored state and get none.

    Args:
        anchors: embeddings, split like the batch.
        vectors: one of the bank's two arrays.
        *indices: rows for each anchor, or for all anchors the same.
        mesh: the mesh.

    Returns:
        For each of the indices, one score per anchor and row asked for.
    """
    split, axes = over_batch(mesh).spec, batch_axes(mesh)
    each = tuple(split if index.ndim == 2 else PartitionSpec() for index in indices)
    n = shares(mesh)
    ring = [(device, (device + 1) % n) for device in range(n)]
    varying = partial(jax.lax.pcast, axis_name=axes, to="varying")

    def around(visit, carried):
        """What was carried to all devices and has come home."""

        def stay(carried, _):
            carried = visit(carried)
            return jax.tree.map(
                lambda leaf: jax.lax.ppermute(leaf, axes, ring), carried
            ), None

        return jax.lax.scan(stay, carried, length=n)[0]

    def rows_here(index, vectors):
        index, here = _mine(index, vectors, mesh)
        return (index if index.ndim == 2 else index[None, :]), here

    @jax.custom_vjp
    def scores(anchors, vectors, indices):
        def visit(carried):
            anchors, indices, found = carried
            product = jnp.matmul(anchors, vectors.T, precision=HIGHEST)
            return anchors, indices, tuple(map(partial(asked, product), indices, found))

        def asked(product, index, found):
            index, here = rows_here(index, vectors)
            return found + jnp.where(here, jnp.take_along_axis(product, index, 1), 0)

        indices = tuple(i if i.ndim == 2 else varying(i) for i in indices)
        nothing = tuple(
            varying(jnp.zeros((anchors.shape[0], index.shape[-1]), anchors.dtype))
            for index in indices
        )
        return around(visit, (anchors, indices, nothing))[-1]

    def forward(anchors, vectors, indices):
        return scores(anchors, vectors, indices), (vectors, indices)

    def backward(kept, gradients):
        vectors, indices = kept

        def visit(carried):
            total, indices, gradients = carried
            product = jnp.zeros((total.shape[0], vectors.shape[0]), total.dtype)
            rows = jnp.arange(total.shape[0])[:, None]
            for index, gradient in zip(indices, gradients, strict=True):
                index, here = rows_here(index, vectors)
                product = product.at[rows, index].add(jnp.where(here, gradient, 0))
            total = total + jnp.matmul(product, vectors, precision=HIGHEST)
            return total, indices, gradients

        shape = gradients[0].shape[0], vectors.shape[1]
        nothing = varying(jnp.zeros(shape, gradients[0].dtype))
        indices = tuple(i if i.ndim == 2 else varying(i) for i in indices)
        total, _, _ = around(visit, (nothing, indices, gradients))
        return total, varying(jnp.zeros(vectors.shape, vectors.dtype)), None

    scores.defvjp(forward, backward)
    return jax.shard_map(
        scores, mesh=mesh, in_specs=(split, split, each), out_specs=(split,) * len(each)
    )(anchors, vectors, indices)


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
