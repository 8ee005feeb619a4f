"""Draws of negative and positive examples by class."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from hintjax import _checks


class Classes(NamedTuple):
    """The training examples by class: whole classes, one after another.

    Attributes:
        order: positions of the examples, sorted by label.
        label: the labels in this order.
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
    """Draws examples of other classes, separately for each anchor.

    Args:
        classes: the training examples by class.
        keys: one key per anchor.
        label: the anchors' labels.
        count: number of examples per anchor.

    Returns:
        Indices, and whether they are of another class: all of them, or none if there
        is no other class.
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
    """Draws examples of any class, the same for all anchors.

    Args:
        classes: the training examples by class.
        key: the random key.
        label: the anchors' labels.
        count: number of examples.

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
    """Draws one example of each anchor's own class; it may be the anchor itself.

    Args:
        classes: the training examples by class.
        keys: one key per anchor.
        label: the anchors' labels.

    Returns:
        One index per anchor.
    """
    _check_draw("draw_same", classes, label)
    _checks.key("draw_same", 1, keys=keys)
    _checks.same_leading("draw_same", 0, keys=keys, label=label)
    start, own = _range(classes, label)

    def draw(key, start, own):
        return classes.order[start + jax.random.randint(key, (), 0, own)]

    return jax.vmap(draw)(keys, start, own)


def labeled(
    classes: Classes, index: Int[Array, " batch"], label: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    """Whether the training example at each index has this label.

    Args:
        classes: the training examples by class.
        index: positions of examples in the training set.
        label: labels, one for each index.

    Returns:
        One bool for each index; False for an index that is not in the training set.

    >>> classes = by_class(jnp.array([1, 0, 1]))
    >>> labeled(classes, jnp.array([0, 1, 2, 3]), jnp.array([1, 1, 1, 1])).tolist()
    [True, False, True, False]
    """
    _check_draw("labeled", classes, label)
    _checks.labels("labeled", label.shape, index=index)
    start, own = _range(classes, label)
    last = classes.order.shape[0] - 1

    def halved(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        before = (low < high) & (classes.order[jnp.minimum(middle, last)] < index)
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    # The order is sorted by label, and by position within a class: a binary search.
    bounds = (start, start + own)
    low, _ = jax.lax.fori_loop(0, (last + 1).bit_length(), halved, bounds)
    return (low < start + own) & (classes.order[jnp.minimum(low, last)] == index)


def _check_draw(caller: str, classes: Any, label: Any) -> None:
    """Raises unless the arguments are `Classes` and labels."""
    _checks.instance(caller, Classes, classes=classes)
    _checks.labels(caller, None, label=label)


def _range(classes: Classes, label: Array) -> tuple[Array, Array]:
    """The start of each label's class in the order, and its size."""
    start = jnp.searchsorted(classes.label, label, side="left")
    return start, jnp.searchsorted(classes.label, label, side="right") - start
