"""Metrics: functions of output and labels, for `task(loss, metrics=...)`.

A metric is a function `(output, labels) -> values`. It gives one value per example, or
one value per label. Then `task` takes the mean over the labels of each example. A
metric is only reported; nothing is trained with it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Num

from hintjax import _checks
from hintjax._numerics import as_float

__all__ = [
    "Metric",
    "absolute_error",
    "accuracy",
    "binary_accuracy",
    "f1",
    "intersection_over_union",
]

Metric = Callable[[Array, Array], Float[Array, "batch ..."]]


def accuracy(
    output: Float[Array, "*batch classes"], labels: Integer[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Accuracy: 1 where the largest output is that of the label's class, else 0.

    A label outside 0..classes - 1 is never right.

    Args:
        output: logits or probabilities, for 2 or more classes.
        labels: the classes: one for each example, or one for each position of dense
            labels (segmentation).

    Returns:
        0 or 1 for each label.

    >>> accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0]))
    Array([1., 0.], dtype=float32)
    """
    output = as_float("accuracy", output)
    if not class_labels(output, labels):
        wanted = "integer labels of the output's shape without its last axis"
        got = f"output {_checks.described(output)}, labels {_checks.described(labels)}"
        do = "One logit for two classes needs binary_accuracy."
        raise _checks.Refusal(_checks.message("accuracy", wanted, got, do))
    return (output.argmax(-1) == labels).astype(output.dtype)


def binary_accuracy(
    output: Float[Array, "..."], labels: Num[Array, "..."]
) -> Float[Array, "..."]:
    """Binary accuracy: 1 where the logit has the sign of its label, else 0.

    A logit > 0 is a probability above 1/2. A label above 1/2 is positive.

    Args:
        output: one logit for each label; a last axis of size 1 may be added.
        labels: 0 or 1, or probabilities: (batch,), or (batch, classes) where an example
            may be of many classes.

    Returns:
        0 or 1 for each label.

    >>> binary_accuracy(jnp.array([[3.0], [-1.0]]), jnp.array([1, 1]))
    Array([1., 0.], dtype=float32)
    """
    output, labels = _alike("binary_accuracy", output, labels)
    return ((output > 0) == (labels > 0.5)).astype(output.dtype)


def f1(
    output: Float[Array, "*batch classes"], labels: Num[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """F1 of each example, for examples that may be of many classes.

    F1 = 2 TP / (2 TP + FP + FN)

    TP counts the classes whose logit is > 0 and whose label is 1; FP and FN count the
    classes where only the logit or only the label says so. An example without such
    classes has F1 = 1. The mean over examples is scikit-learn's
    `f1_score(average="samples", zero_division=1)`.

    Args:
        output: one logit for each class.
        labels: 0 or 1 for each class.

    Returns:
        One value per example, in [0, 1].

    >>> f1(jnp.array([[3.0, 2.0, -1.0]]), jnp.array([[1, 0, 1]]))
    Array([0.5], dtype=float32)
    """
    output, labels = _alike("f1", output, labels)
    _checks.rank("f1", 1, "*batch classes", output=output)
    found, true = output > 0, labels > 0.5
    both = jnp.sum((found & true).astype(output.dtype), -1)
    one = jnp.sum((found ^ true).astype(output.dtype), -1)
    some = 2 * both + one
    return jnp.where(some == 0, 1, 2 * both / jnp.maximum(some, 1))


def absolute_error(
    output: Float[Array, "..."], labels: Num[Array, "..."]
) -> Float[Array, "..."]:
    """Absolute error of a regression, |output - label|, in the labels' unit.

    Args:
        output: one number for each label; a last axis of size 1 may be added.
        labels: the targets.

    Returns:
        One value for each label.

    >>> absolute_error(jnp.array([[3.0], [1.0]]), jnp.array([1, 1]))
    Array([2., 0.], dtype=float32)
    """
    output, labels = _alike("absolute_error", output, labels)
    return jnp.abs(output - labels)


def intersection_over_union(
    output: Float[Array, "batch ... classes"],
    labels: Integer[Array, "batch ..."],
    *,
    ignore: int | Sequence[int] = (),
) -> Float[Array, " batch"]:
    """Intersection over union (IoU) of each example, for dense labels.

    IoU = mean_c |found_c and true_c| / |found_c or true_c|

    The mean is over the classes that the example's labels or predictions have. (The
    benchmarks of segmentation count over the whole split instead.)

    Args:
        output: one logit for each class at each position.
        labels: the class of each position.
        ignore: labels of positions that do not count, such as 255. With `task`:
            `functools.partial(intersection_over_union, ignore=255)`.

    Returns:
        One value per example, in [0, 1]; 1 if no position counts.

    >>> output = jax.nn.one_hot(jnp.array([[0, 1, 1, 1]]), 2)
    >>> intersection_over_union(output, jnp.array([[0, 0, 1, 255]]), ignore=255)
    Array([0.5], dtype=float32)
    """
    caller = "intersection_over_union"
    output = as_float(caller, output)
    if not class_labels(output, labels):
        wanted = "integer labels of the output's shape without its last axis"
        got = f"output {_checks.described(output)}, labels {_checks.described(labels)}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    valid = not_ignored(labels, ignored(caller, ignore))
    true = jax.nn.one_hot(labels, output.shape[-1], dtype=bool)
    found = jax.nn.one_hot(output.argmax(-1), output.shape[-1], dtype=bool)
    axes = tuple(range(1, labels.ndim))

    def count(which: Bool[Array, "..."]) -> Array:
        return jnp.sum((which & valid[..., None]).astype(output.dtype), axes)

    union = count(true | found)
    shares = count(true & found) / jnp.maximum(union, 1)
    there = jnp.sum((union > 0).astype(output.dtype), -1)
    return jnp.where(there == 0, 1, jnp.sum(shares, -1) / jnp.maximum(there, 1))


def class_labels(output: Array, labels: Array) -> bool:
    """Whether these are the classes of such outputs: where `accuracy` has a meaning.

    They are integers, one for each row of the output, which has 2 or more columns.

    >>> class_labels(jnp.zeros((8, 10)), jnp.zeros(8, int))
    True
    >>> class_labels(jnp.zeros((8, 1)), jnp.zeros(8, int))  # one logit, or a number
    False
    """
    integers = _checks.is_array(labels) and jnp.issubdtype(labels.dtype, jnp.integer)
    columns = output.shape[-1] if output.ndim > 1 else 1
    return integers and columns > 1 and labels.shape == output.shape[:-1]


def ignored(caller: str, ignore: int | Sequence[int]) -> tuple[int, ...]:
    """The labels of `ignore=`, checked.

    Raises:
        Refusal: unless they are integers.
    """
    values = (ignore,) if isinstance(ignore, int) else ignore
    several = isinstance(values, Sequence) and not isinstance(values, str)
    if not several or not all(type(value) is int for value in values):
        wanted = "ignore to be an integer, or several"
        do = "For instance 255."
        raise _checks.WrongType(
            _checks.message(caller, wanted, _checks.described(ignore), do)
        )
    return tuple(values)


def not_ignored(
    labels: Integer[Array, "..."], ignore: Sequence[int]
) -> Bool[Array, "..."]:
    """The mask of the labels that are not among `ignore`."""
    range_ = jnp.iinfo(labels.dtype)
    valid = jnp.ones(labels.shape, bool)
    for value in ignore:
        if range_.min <= value <= range_.max:
            valid &= labels != value
    return valid


def _alike(caller: str, output: Array, labels: Array) -> tuple[Array, Array]:
    """Both as floats of the labels' shape."""
    output = as_float(caller, output)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    array = _checks.is_array(labels)
    if not array or not any(jnp.issubdtype(labels.dtype, kind) for kind in kinds):
        got, do = _checks.described(labels), "Give one number for each label."
        raise _checks.WrongType(_checks.message(caller, "labels of numbers", got, do))
    if output.shape == (*labels.shape, 1):
        output = output.reshape(labels.shape)
    _checks.same_shape(caller, output=output, labels=labels)
    return output, labels.astype(output.dtype)
