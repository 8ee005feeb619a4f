"""The memory bank of contrastive distillation: state, and pure functions of it.

`init` makes a bank; `update` writes the embeddings of a step into it; `draw_*` choose
candidates by class. All functions run inside jit, on the device.

Draws are uniform and *with* replacement (the published loader draws without). The draw
for an example depends on the key and the example, not on its place in the batch.

On a mesh the rows of a bank may be split over the devices that split the batch. The
data that a step sends then hardly grow with the number of devices: the rows of an
example are read and changed only on the device that holds them (`batch_rows`,
`update`); rows for all devices are summed (`shared_rows`); if each anchor has its own
candidates, each device scores all anchors with its rows (`scores_by_rows`). The results
equal the results of one device.
"""

from functools import partial
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from hintjax import _checks
from hintjax._numerics import either, unit
from hintjax.memory.rows import Mail, MemoryBank, own_rows, split_rows
from hintjax.sharding import automatic, batch_axes, over_batch, shares


def init(
    key: Key[Array, ""], size: int, features: int = 128, mesh: Mesh | None = None
) -> MemoryBank:
    """A random bank: entries U(-a, a) with a = sqrt(3 / features), of norm about 1.

    Args:
        key: the random key of the entries.
        size: number of training examples; 0 for none.
        features: size of an embedding.
        mesh: rows of zeros, which are never read, are appended until the devices of
            this mesh can share the rows evenly. A checkpoint of the bank is restored
            with the number of rows that its new mesh needs.

    Returns:
        The bank; its constants are not set yet.
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

    No gradient passes. If an example is twice in the batch, its last embedding counts:
    the published code does the same on a CPU, this function on every device.

    Args:
        bank: the bank.
        index: the positions of the batch's examples in the training set.
        student: the student's embeddings of the batch.
        teacher: the teacher's embeddings of the batch.
        momentum: the weight of the old row, in [0, 1].
        where: the examples that count; the others write nothing.
        mesh: the mesh over which the bank's rows are split; each device writes its own
            rows.

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
            raise _checks.Refusal(text)
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


def _last(
    index: Array, where: Array, place: Array, all_index: Array, all_where: Array
) -> Array:
    """Whether an example counts, and no later example with its index counts."""
    same = (index[:, None] == all_index[None, :]) & all_where[None, :]
    places = jnp.arange(all_index.shape[0])[None, :]
    return where & (jnp.max(jnp.where(same, places, -1), 1) == place)


def _mixed(rows: Array, embedded: Array, momentum: float) -> Array:
    """The new rows of unit norm, mixed from old rows and embeddings."""
    embedded = jax.lax.stop_gradient(embedded).astype(rows.dtype)
    return unit(momentum * rows + (1 - momentum) * embedded)


def _updated_by_rows(
    bank: MemoryBank,
    index: Array,
    student: Array,
    teacher: Array,
    momentum: float,
    where: Array | None,
    mesh: Mesh,
) -> MemoryBank:
    """`update` of a bank whose rows are split over a mesh."""
    split, homes = over_batch(mesh).spec, split_rows(bank, mesh)

    @partial(
        jax.shard_map,
        mesh=automatic(mesh),
        in_specs=(homes, *[split] * 4),
        out_specs=homes,
    )
    def local(bank, index, student, teacher, where):
        gather = partial(jax.lax.all_gather, axis_name=batch_axes(mesh), tiled=True)
        batch = index.shape[0]
        place = jax.lax.axis_index(batch_axes(mesh)) * batch + jnp.arange(batch)
        writes = _last(index, where, place, gather(index), gather(where))
        mail = Mail(index, writes, bank.student.shape[0], mesh)

        def deliver(turn, vectors):
            row = mail.sent(turn, index, -1)
            embedded = (mail.sent(turn, student, 0), mail.sent(turn, teacher, 0))
            here, there = own_rows(row, vectors[0], mesh)
            target = jnp.where(there, here, vectors[0].shape[0])
            return tuple(
                old.at[target].set(_mixed(old[here], new, momentum), mode="drop")
                for old, new in zip(vectors, embedded, strict=True)
            )

        rows = mail.rounds(deliver, (bank.student, bank.teacher))
        return bank._replace(student=rows[0], teacher=rows[1])

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
    """The bank after a step if the step was good, else the bank before it, bit for bit.

    Only the rows that the step can have changed are written, in place: a select
    between two whole banks would copy a bank. If the batch is a quarter of the bank or
    more, whole banks are selected.

    Args:
        good: whether the step counts.
        bank: the bank after `update`.
        before: the bank before `update`.
        index: the positions of the batch's examples in the training set.
        mesh: the mesh over which the bank's rows are split; each device writes its own
            rows.

    Returns:
        `bank` or `before`.

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
        return either(good, bank, before)  # cheaper than rows of a short bank

    def chosen(new, old):
        return new.at[index].set(jnp.where(good, new[index], old[index]))

    return MemoryBank(
        chosen(bank.student, before.student),
        chosen(bank.teacher, before.teacher),
        *either(good, bank[2:], before[2:]),
    )


def _selected_by_rows(
    good: Array, bank: MemoryBank, before: MemoryBank, index: Array, mesh: Mesh
) -> MemoryBank:
    """`select` between banks whose rows are split over a mesh."""
    rows, homes = over_batch(mesh).spec, split_rows(bank, mesh)

    @partial(
        jax.shard_map,
        mesh=automatic(mesh),
        in_specs=(PartitionSpec(), homes, homes, rows),
        out_specs=homes,
    )
    def local(good, bank, before, index):
        index = jax.lax.all_gather(index, batch_axes(mesh), tiled=True)
        # An index of another device becomes a row of this device, which is
        # selected, too: that is harmless.
        return select(good, bank, before, own_rows(index, bank.student, mesh)[0])

    return local(good, bank, before, index)


def set_once(stored: Float[Array, ""], computed: Float[Array, ""]) -> Float[Array, ""]:
    """A constant that the first batch sets; later batches do not change it."""
    return jnp.where(jnp.isneginf(stored), computed.astype(stored.dtype), stored)


def _check(caller: str, bank: Any, index: Any, mesh: Any) -> None:
    """Raises unless the arguments are a bank, indices, and a mesh or None."""
    _checks.instance(caller, MemoryBank, bank=bank)
    _checks.instance(caller, (Mesh, NoneType), mesh=mesh)
    _checks.labels(caller, None, index=index)
