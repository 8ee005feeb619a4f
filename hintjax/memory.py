"""The memory bank of contrastive distillation: state, and pure functions of it.

`init` makes a bank; `update` gives the bank after a step, changed by what the step
embedded; `draw_*` choose candidates by class. All of it runs inside jit, on the device.

Draws are uniform and *with* replacement (the published loader draws without). What is
drawn for an example depends on the key and the example, not on its place in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from hintjax import _checks
from hintjax._numerics import unit


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


def init(key: Key[Array, ""], size: int, features: int = 128) -> MemoryBank:
    """A random bank: entries U(-a, a) with a = sqrt(3 / features), of norm about 1.

    Args:
        key: for the entries.
        size: number of training examples; 0 for none.
        features: size of an embedding.

    Returns:
        The bank, without constants.
    """
    bound = (3 / features) ** 0.5
    student, teacher = (
        jax.random.uniform(key, (size, features), jnp.float32, -bound, bound)
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

    Returns:
        The new bank, with the same constants.

    >>> bank = init(jax.random.key(0), 4, 2)
    >>> vector = jnp.array([[0.6, 0.8]])
    >>> new = update(bank, jnp.array([1]), vector, vector, momentum=0.0)
    >>> new.teacher[1]
    Array([0.6, 0.8], dtype=float32)
    """
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


def set_once(stored: Float[Array, ""], computed: Float[Array, ""]) -> Float[Array, ""]:
    """A constant that the first batch sets, and that stays from then on."""
    return jnp.where(jnp.isneginf(stored), computed.astype(stored.dtype), stored)


def by_class(labels: Int[Array, " size"]) -> Classes:
    """Sorts the training examples by class.

    >>> by_class(jnp.array([1, 0, 1])).order
    Array([1, 0, 2], dtype=int32)
    """
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
    start, own = _range(classes, label)

    def draw(key, start, own):
        return classes.order[start + jax.random.randint(key, (), 0, own)]

    return jax.vmap(draw)(keys, start, own)


def _range(classes, label):
    """Where each label's class begins in the order, and its size."""
    start = jnp.searchsorted(classes.label, label, side="left")
    return start, jnp.searchsorted(classes.label, label, side="right") - start
