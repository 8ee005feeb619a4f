"""Draws of negative and positive examples by class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from hintjax import _checks


class Classes(NamedTuple):
    """The training examples by class: whole classes, one after another.

    Attributes:
        order: the examples, sorted by label.
        label: their labels.
    """

    order: Int[Array, " size"]
    label: Int[Array, " size"]


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


def _check_draw(caller, classes, label):
    _checks.instance(caller, Classes, classes=classes)
    _checks.labels(caller, None, label=label)


def _range(classes, label):
    """Where each label's class begins in the order, and its size."""
    start = jnp.searchsorted(classes.label, label, side="left")
    return start, jnp.searchsorted(classes.label, label, side="right") - start
