"""The tasks of the command: labels, loss, metric and form of KD of each.

Everything that depends on the task is in this table.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from hintjax import metrics
from hintjax._checks import same_shape
from hintjax._numerics import as_float, keep, masked_mean
from hintjax.data import targets
from hintjax.data.targets import IGNORED, Targets
from hintjax.method import Method
from hintjax.methods import binary_kd, dense_kd, kd, regression_kd, soft_targets
from hintjax.methods.task import task
from hintjax.metrics import Metric, not_ignored

Key = TypeVar("Key", bound=Hashable)


class Task(NamedTuple):
    """A task: its labels, its loss, its metric and its form of KD.

    Attributes:
        loss: loss of the output and the labels; see `hintjax.task`.
        name: name of the metric.
        metric: metric of the output and the labels; see `hintjax.task`.
        guessed: `(labels) -> metric of about the best constant prediction`.
        kd: `(temperature) -> KD for such outputs`.
        soft: the same without the factor T^2, as in FitNets' second stage.
        targets: how labels are read; None for classes.
        larger: whether a larger metric is better. Such a metric is between 0 and 1 and
            is shown in percent. Otherwise it is an error.
        ignore: labels that do not count.
        tempered: whether the form of KD has a temperature.
    """

    loss: Callable[[Array, Array], Array]
    name: str
    metric: Metric
    guessed: Callable[[np.ndarray], float]
    kd: Callable[[float], Method]
    soft: Callable[[float], Method]
    targets: Targets | None = None
    larger: bool = True
    ignore: Sequence[int] = ()
    tempered: bool = True

    def method(self) -> Method:
        """The task as a method, which reports its metric."""
        return task(self.loss, metrics={self.name: self.metric}, ignore=self.ignore)

    def measured(
        self, output: Array, labels: Array, where: Bool[Array, " batch"]
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """The sum of the metric over a batch, and the number of examples that count."""
        output = as_float(self.name, output)
        values, valid = self.metric(output, labels), jnp.ones(labels.shape, bool)
        if self.ignore:
            valid = not_ignored(labels, self.ignore)
        if values.shape == labels.shape:
            values = masked_mean(values, valid, batch_dims=1)
        counted = where & valid.any(tuple(range(1, valid.ndim)))
        return keep(values, counted).sum(), counted.sum()

    def best(self, values: Mapping[Key, float]) -> Key:
        """The key of the best value."""
        return (max if self.larger else min)(values, key=values.__getitem__)

    def skill(self, value: float, guessed: float) -> float:
        """A metric as a number up to 1: itself, or the part of an error that is gone.

        Args:
            value: the metric.
            guessed: the metric of a constant prediction.
        """
        if self.larger:
            return value
        return 1 - value / guessed if guessed > 0 else float(value == 0)

    def learned(self, value: float, guessed: float) -> bool:
        """Whether a network learned: it is not near what a constant prediction gives.

        For classes: above twice chance. Otherwise: nearer to a perfect prediction than
        to a constant one.
        """
        if self.targets is None:
            return value > 2 * guessed
        perfect = 1 if self.larger else 0
        return abs(perfect - value) < abs(perfect - guessed) / 2

    def above(self) -> str:
        """The rule of `learned`, in words."""
        classes = self.targets is None
        return "above twice chance" if classes else "nearer to perfect than to a guess"

    def signed(self, difference: float) -> str:
        """A difference of the metric as text, with its sign."""
        return f"{100 * difference:+.1f}" if self.larger else f"{difference:+.4g}"

    def shown(self, value: float) -> str:
        """The metric as text: in percent, or with four digits."""
        return f"{100 * value:.1f}" if self.larger else f"{value:.4g}"


_HEAD = "The network is made as factory(classes=...): classes is the size of its head."


def _sigmoid(output: Array, labels: Array) -> Array:
    """The cross-entropy of sigmoids, summed over the classes of an example."""
    same_shape("task", do=_HEAD, output=output, labels=labels)
    labels = labels.astype(output.dtype)
    return optax.sigmoid_binary_cross_entropy(output, labels).sum(-1)


def _squared(output: Array, labels: Array) -> Array:
    """The mean squared error over the outputs of an example."""
    same_shape("task", do=_HEAD, output=output, labels=labels)
    return jnp.square(output - labels).mean(-1)


def _largest_class(labels: np.ndarray) -> float:
    """The accuracy of the most frequent class."""
    return float(np.bincount(labels, minlength=1).max() / max(len(labels), 1))


def _largest_dense_class(labels: np.ndarray) -> float:
    """The accuracy of the class that most positions have."""
    return _largest_class(labels[labels != IGNORED])


def _most_frequent(labels: np.ndarray) -> float:
    """The best F1 of always predicting the most frequent classes."""
    true = labels[:, np.argsort(-labels.mean(0), kind="stable")].astype(float)
    found = np.arange(1, true.shape[1] + 1)
    scores = 2 * true.cumsum(1) / (found + true.sum(1, keepdims=True))
    return float(max(scores.mean(0).max(), (true.sum(1) == 0).mean()))


def _median(labels: np.ndarray) -> float:
    """The absolute error of the median."""
    return float(np.abs(labels - np.median(labels, 0)).mean())


def _dense_kd(temperature: float) -> Method:
    return dense_kd(temperature, ignore=IGNORED)


def _regression_kd(temperature: float) -> Method:
    return regression_kd()


TASKS: dict[str, Task] = {
    "classification": Task(
        optax.softmax_cross_entropy_with_integer_labels,
        "accuracy",
        metrics.accuracy,
        _largest_class,
        kd,
        soft_targets,
    ),
    "binary": Task(
        _sigmoid,
        "accuracy",
        metrics.binary_accuracy,
        lambda labels: float(max(labels.mean(), 1 - labels.mean())),
        binary_kd,
        binary_kd,
        targets.BINARY,
    ),
    "multi-label": Task(
        _sigmoid,
        "f1",
        metrics.f1,
        _most_frequent,
        binary_kd,
        binary_kd,
        targets.MULTI_LABEL,
    ),
    "regression": Task(
        _squared,
        "absolute_error",
        metrics.absolute_error,
        _median,
        _regression_kd,
        _regression_kd,
        targets.NUMBERS,
        larger=False,
        tempered=False,
    ),
    "dense": Task(
        optax.softmax_cross_entropy_with_integer_labels,
        "accuracy",
        metrics.accuracy,
        _largest_dense_class,
        _dense_kd,
        _dense_kd,
        targets.DENSE,
        ignore=(IGNORED,),
    ),
}
