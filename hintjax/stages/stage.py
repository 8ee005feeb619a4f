"""The types of a stage: `Stage`, its `State`, batches, metrics, and `Parts`.

A batch is a dict: the inputs as "image" (or whatever entry `inputs` selects), the
entries that the objective reads ("label", "index"), and optionally "where", a bool for
each example that says whether the example counts.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from hintjax._checks import Refusal, WrongType, instance, message, needed
from hintjax.method import Batch
from hintjax.networks import Features, Variables
from hintjax.stages.report import Report
from hintjax.stages.skipping import Norms, Skipped

Metrics = dict[str, Float[Array, ""]]
# Variables, or Flax variables: a dict with "params" and other collections.
Given = Variables | Mapping[str, PyTree]


class State(NamedTuple):
    """Everything that a stage changes; a pytree of arrays.

    Attributes:
        params: `{"student": ..., "regressors": ...}`.
        state: the student's other collections (BatchNorm statistics).
        memory: the method's memory, which goes from step to step.
        opt_state: the optimizer's state.
        step: number of steps, skipped ones included.
        key: the random key; every step folds its number into it.
        skipped: number of skipped steps.
        norms: gradient norms that a `SpikeGuard` compares with; empty without one.
    """

    params: dict[str, PyTree]
    state: PyTree
    memory: PyTree
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    skipped: Skipped
    norms: Norms | tuple[()] = ()


class Parts(NamedTuple):
    """The arguments of the loss: one batch (or micro-batch) and the state it meets."""

    params: dict[str, PyTree]
    state: PyTree
    memory: PyTree
    taught: Features
    batch: Batch
    key: Key[Array, ""]
    step: Int[Array, ""]


class Carry(NamedTuple):
    """The student's statistics and the method's memory after a (micro-)batch."""

    state: PyTree
    memory: PyTree


class Chosen(NamedTuple):
    """Which arrays a stage changes, and how.

    Attributes:
        transform: the optimizer of this stage.
        trained: for every parameter, whether the stage trains it.
        kept: for every array of the student's state, whether its new value is kept.
    """

    transform: optax.GradientTransformation
    trained: PyTree
    kept: PyTree


# (loss, parts) -> Chosen, from the traced program of the loss.
Choose = Callable[[Callable[..., tuple[Array, tuple[Carry, Metrics]]], Parts], Chosen]


class Stage(NamedTuple):
    """An optax update step for one objective.

    Attributes:
        init: `(key, student, teacher, batch, data=None, carry=None) -> State`, from the
            `Variables` of both networks. Flax variables (a dict with "params") stand
            for them here and wherever a stage takes a teacher. All arrays are copied,
            so that donation never deletes the caller's. `data` (`Data`) holds the
            labels of the training set, for methods that need its size and labels.
            `carry` is the `State` of an earlier stage, whose regressors and memory are
            taken over by the terms of the same name; a method with a `prepare` needs
            the `State` of that stage.
        teach: `(state, teacher, batch) -> Features`: the teacher's features of a batch,
            without gradients.
        step: `(state, taught, batch) -> (state, metrics)`: one update from the
            teacher's features; pure and not jitted. The metrics are the objective's and
            `skipped` (number of skipped steps so far). With a `SpikeGuard` they also
            hold `spikes` (number of steps that it skipped) and `norm` (length of the
            gradient).
        update: `(state, teacher, batch) -> (state, metrics)`: `teach` and `step`,
            jitted. The state is donated.
        evaluate: `(state, teacher, batch) -> metrics`: the objective with
            `train=False`; the state stays as it is.
        report: `(state, teacher, batch) -> {"terms": ..., "layers": ...}`: losses and
            gradients of the next update of this batch; the state stays as it is. It
            costs one backward pass per term. "terms" has for each term of the
            objective (or for "loss", if the method is no objective) its weighted
            `loss`, the `norm` of that loss' gradient, its `share` in the sum of these
            norms, and `shared`, the norm by the student's arrays that all terms move.
            "layers" has the norm of the whole gradient for each outermost
            layer of the student ("student/name") and each regressor
            ("regressors/term/pair"). A norm is finite where its gradient is; the shares
            are finite where all norms are.
    """

    init: Callable[..., State]
    teach: Callable[[State, Given | None, Batch], Features]
    step: Callable[[State, Features, Batch], tuple[State, Metrics]]
    update: Callable[[State, Given | None, Batch], tuple[State, Metrics]]
    evaluate: Callable[[State, Given | None, Batch], Metrics]
    report: Callable[[State, Given | None, Batch], Report]


def image(batch: Batch) -> Float[Array, "batch h w c"]:
    """Returns the default inputs of a network: the entry "image" of a batch.

    Raises:
        ValueError: if there is no such entry, or it does not have four axes.
        TypeError: if it holds integers.
    """
    do = "Select the inputs with inputs= and teacher_inputs=."
    found = needed("batch", batch, "image", do)
    if not jnp.issubdtype(found.dtype, jnp.floating):
        do = "Scale and standardize the images first."
        wanted = '"image" to be floating point'
        raise WrongType(message("batch", wanted, f"{found.dtype}", do))
    if found.ndim != 4:
        do = "Add the axis, or select other inputs with inputs=."
        wanted = '"image" to be (batch, h, w, c)'
        raise Refusal(message("batch", wanted, f"{found.shape}", do))
    return found


def student_variables(state: State) -> Variables:
    """Returns the student's variables: the network to ship, or the next stage's start.

    Args:
        state: the state of a stage.

    Raises:
        WrongType: if it is anything else, such as `(state, metrics)`.
    """
    do = "Pass the first result of stage.update."
    instance("student_variables", State, do, state=state)
    return Variables(state.params["student"], state.state)
