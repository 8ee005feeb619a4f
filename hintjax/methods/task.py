"""The task: a loss of the student's output and the labels."""

from collections.abc import Callable, Mapping, Sequence
from types import NoneType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from hintjax._checks import Refusal, described, function, instance, message, needed
from hintjax._numerics import as_float, keep, masked_mean
from hintjax.method import Applied, Batch, Context, Data, Method, nothing, output_of
from hintjax.metrics import Metric, accuracy, class_labels, ignored, not_ignored
from hintjax.networks import Features, Wants


def task(
    loss: Callable[[Float[Array, "batch ..."], Num[Array, "batch ..."]], Array],
    label: str = "label",
    *,
    metrics: Mapping[str, Metric] | None = None,
    ignore: int | Sequence[int] = (),
) -> Method:
    """The task as a method: a loss of the student's output and the labels.

    The metrics belong to the task. The default is the `accuracy` of class labels:
    integers of the output's shape without its last axis, which has 2 or more columns.
    Other labels have no metric unless `metrics` names one::

        task(sigmoid_loss, metrics={"accuracy": hintjax.metrics.binary_accuracy})
        task(squared_loss, metrics={"error": hintjax.metrics.absolute_error})

    So one sigmoid logit with integer labels needs `metrics`: it has the shapes of an
    integer regression.

    Dense labels, such as (batch, h, w) for segmentation, give one value for each label.
    The value of an example is then the mean over its valid labels (all labels that are
    not in `ignore`). An example without valid labels has the value 0, and counts in the
    mean of the loss over the batch; `where` in the batch leaves it out. The metrics are
    means over the examples with valid labels.

    Args:
        loss: `(output, labels) -> one value per example`, for instance
            `optax.softmax_cross_entropy_with_integer_labels`; or one value per label.
        label: the name of the labels in the batch.
        metrics: functions `(output, labels) -> one value per example`, or one value per
            label, by the names under which they are reported; see `hintjax.metrics`.
            By default `accuracy` for class labels and nothing for other labels; `{}`
            reports nothing.
        ignore: integer labels that are left out of the loss and of the metrics, such as
            255, -100 or -1. The loss never sees them. By default every label counts.

    Returns:
        The method.

    Raises:
        ValueError: when a stage is traced: if the labels are not in the batch, are not
            as many as the outputs, or are not labels that the loss takes; if the loss
            gives neither one value per example nor one value per label.
    """
    function("task", loss=loss)
    instance("task", str, label=label)
    instance("task", (Mapping, NoneType), metrics=metrics)
    for name, metric in (metrics or {}).items():
        function("task", **{f"the metric {name!r}": metric})
    if "weighted" in (metrics or {}):
        do = "Give the metric another name."
        raise Refusal(message("task", "no metric named 'weighted'", "one", do))
    left_out = ignored("task", ignore)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        if student.output is not None:
            output_of("task", "student", student)
        return nothing(key, student, teacher, data)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        labels = needed("task", batch, label, "Name the labels with label=.")
        output = as_float("task", output_of("task", "student", student))
        _check_examples(output, labels)
        valid = _valid(labels, left_out)
        values = _values(loss, output, labels, valid)
        chosen = metrics
        if chosen is None:
            chosen = {"accuracy": accuracy} if class_labels(output, labels) else {}
        where = batch.get("where")
        found = {
            name: _metric(name, metric(output, labels), labels, valid, where)
            for name, metric in chosen.items()
        }
        return values, memory, found

    return Method(Wants(output=True), Wants(), init, apply, ignored=left_out)


def _check_examples(output: Array, labels: Array) -> None:
    """Raises unless the labels are an array with a row for each row of the output."""
    fits = output.ndim > 0 and labels.ndim > 0
    if not fits or labels.shape[0] != output.shape[0]:
        wanted = f"labels of {output.shape[0]} examples" if output.ndim else "labels"
        wanted += f", as the output {tuple(output.shape)} has"
        do = "Give every example its label."
        raise Refusal(message("task", wanted, described(labels), do))


def _valid(labels: Array, left_out: Sequence[int]) -> Array | None:
    """The mask of the labels that count; None if nothing is to be ignored."""
    if not left_out:
        return None
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        do = "Leave out ignore=."
        raise Refusal(message("task", "integer labels", described(labels), do))
    return not_ignored(labels, left_out)


def _values(
    loss: Callable[[Array, Array], Array],
    output: Array,
    labels: Array,
    valid: Array | None,
) -> Float[Array, " batch"]:
    """The loss of each example, over its valid labels."""
    asked = labels
    if valid is not None:
        asked = jnp.where(valid, labels, 0)
        if output.shape[: valid.ndim] == valid.shape:
            output = keep(output, valid)
    do = "Pass another loss or other labels: one label, or one value, per example."
    try:
        values = loss(output, asked)
    except (jax.errors.JAXTypeError, Refusal):
        raise
    except (TypeError, ValueError) as error:
        wanted = "labels that the loss takes"
        got = f"output {described(output)} and labels {described(labels)}"
        raise Refusal(message("task", wanted, got, do)) from error
    shapes = {labels.shape} | ({labels.shape[:1]} if valid is None else set())
    # A loss may broadcast one output over many labels by accident.
    if values.shape not in shapes or output.size < values.size:
        what = "example" if valid is None else "label that it may leave out"
        shown = " or ".join(map(str, sorted(shapes, key=len)))
        wanted = f"the loss to give one value per {what}"
        got = f"{values.shape} for output {output.shape} and labels {labels.shape}"
        do = "Take no mean inside a loss: the objective divides by the valid examples."
        raise Refusal(message("task", f"{wanted}, {shown}", got, do))
    _check_rows(loss, output, asked)
    if values.ndim == 1 and valid is None:
        return values
    return masked_mean(values, valid, batch_dims=1)


def _check_rows(
    loss: Callable[[Array, Array], Array], output: Array, labels: Array
) -> None:
    """Raises if the loss broadcasts examples over each other, which no shape tells.

    Outputs (n, 1) and labels (n,) make (n, n) differences, whose mean over the last
    axis is again (n,). Such a loss also takes one example more than there are labels.
    """
    if output.shape == labels.shape or output.shape[1:] != (1,):
        return
    more = jax.ShapeDtypeStruct((output.shape[0] + 1, 1), output.dtype)
    try:
        program = jax.make_jaxpr(loss)(more, labels).jaxpr
    except (TypeError, ValueError):
        return
    # A loss that reads no labels takes any number of them.
    if any(one is program.invars[1] for eqn in program.eqns for one in eqn.invars):
        wanted = "a loss that compares each example with its own label"
        got = f"one that broadcasts output {output.shape} over labels {labels.shape}"
        do = "Drop the last axis of the output in the loss: output[:, 0]."
        raise Refusal(message("task", wanted, got, do))


def _metric(
    name: str,
    values: Array,
    labels: Array,
    valid: Array | None,
    where: Array | None,
) -> Float[Array, ""]:
    """The mean of a metric over the examples that have valid labels."""
    if values.shape not in (labels.shape, labels.shape[:1]):
        wanted = f"the metric {name!r} to give one value per example"
        got = f"{values.shape} for labels {labels.shape}"
        raise Refusal(message("task", f"{wanted}, {labels.shape[:1]}", got))
    if valid is None:
        return masked_mean(values, where)
    if values.shape == labels.shape:
        values = masked_mean(values, valid, batch_dims=1)
    some = valid.any(tuple(range(1, valid.ndim)))
    return masked_mean(values, some if where is None else some & where)
