"""The loss of a stage: the teacher's features, the student's, and the method's loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree

from hintjax._checks import Refusal, mask, message
from hintjax._numerics import masked_mean
from hintjax.method import Context, Method, one_per_example
from hintjax.networks import Features, Network, Wants
from hintjax.stages import debugging, entering
from hintjax.stages.placement import Placement
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import Batch, Carry, Choose, Given, Metrics, Parts, State


class Plan(NamedTuple):
    """The settings of a stage; all functions of the stage are functions of them.

    Attributes:
        student: the student.
        teacher: the teacher, or None.
        method: the method, usually an objective.
        choose: says which arrays the stage changes.
        inputs: `(batch) -> inputs` of the student.
        teacher_inputs: `(batch) -> inputs` of the teacher.
        place: where arrays live.
        accumulate: number of micro-batches in an update.
        spikes: the guard against long gradients, or None.
    """

    student: Network
    teacher: Network | None
    method: Method
    choose: Choose
    inputs: Callable[[Batch], PyTree]
    teacher_inputs: Callable[[Batch], PyTree]
    place: Placement
    accumulate: int
    spikes: SpikeGuard | None


def parts_of(plan: Plan, state: State, taught: Features, batch: Batch) -> Parts:
    """Returns the arguments of the loss of a whole batch.

    Args:
        plan: the stage's settings.
        state: the state before the update.
        taught: the teacher's features of the batch.
        batch: the batch.
    """
    return Parts(
        params=plan.place.params(state.params),
        state=state.state,
        memory=state.memory,
        taught=taught,
        batch=plan.place.batch(batch),
        key=state.key,
        step=state.step,
    )


def features_of_teacher(plan: Plan, variables: Given | None, batch: Batch) -> Features:
    """Returns the teacher's features that the method wants, without gradients.

    Args:
        plan: the stage's settings.
        variables: the teacher's, or None for a method that wants nothing of a teacher.
        batch: the batch.

    Raises:
        ValueError: if the method wants a teacher and its variables are None.
    """
    wants = plan.method.teacher
    if wants == Wants():
        return Features()
    given = entering.teacher(variables)
    if given is None or plan.teacher is None:
        do = "Pass the result of the teacher's init, or hintjax.split(flax_variables)."
        raise Refusal(message("stage", "the teacher's variables", "None", do))
    params, state = given
    shared = plan.place.batch(batch)
    features, _ = plan.teacher.apply(
        plan.place.params({"teacher": params})["teacher"],
        state,
        entering.selected("teacher_inputs", plan.teacher_inputs, shared),
        wants=wants,
        train=False,
    )
    return jax.lax.stop_gradient(features)


def loss(
    plan: Plan,
    parts: Parts,
    *,
    train: bool,
    number: Callable[[Int[Array, ""]], Int[Array, ""]] | None = None,
) -> tuple[Float[Array, ""], tuple[Carry, Metrics]]:
    """Returns the mean loss of a batch, and statistics, memory and metrics after it.

    Args:
        plan: the stage's settings.
        parts: the arguments of the loss.
        train: whether statistics and memory move, and dropout is active.
        number: `(position in parts.batch) -> position in the whole batch` of an
            example, for the messages of `checked`; without it nothing is checked.
    """
    method, batch = plan.method, parts.batch
    inputs = entering.selected("inputs", plan.inputs, batch)
    n = jax.tree.leaves(inputs)[0].shape[0]
    mask("batch", batch.get("where"), (n,))
    ours, theirs = jax.random.split(jax.random.fold_in(parts.key, parts.step))
    shown, state = plan.student.apply(
        parts.params["student"],
        parts.state,
        inputs,
        wants=method.student,
        train=train,
        key=ours,
    )
    apply = method.apply
    if number is not None and debugging.watching():
        apply = debugging.watched(method, number)
    values, memory, metrics = apply(
        parts.params["regressors"],
        parts.memory,
        shown,
        parts.taught,
        batch,
        Context(theirs, parts.step, train),
    )
    one_per_example("stage", "the method", values, n)
    mean = masked_mean(values, batch.get("where"))
    return mean, (Carry(state, memory), {**metrics, "loss": mean})
