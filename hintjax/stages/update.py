"""One update of the student: the step that both stages are.

    taught = teach(state, teacher, batch)          the teacher's features
    state, metrics = step(state, taught, batch)    one update of the student

`update` is the jit of the two. The teacher is an argument: it is never differentiated,
never changed, and runs with `train=False`.

A step whose loss or gradient is not finite changes only its number: parameters,
optimizer state, statistics and memory keep their bits, and `State.skipped` counts the
step. `report` says which term of the objective caused it, and which layers it reached.
"""

from collections.abc import Callable
from functools import partial
from types import NoneType
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from hintjax._checks import (
    Refusal,
    accepts,
    instance,
    message,
    positive_int,
)
from hintjax._numerics import either
from hintjax.method import Method
from hintjax.networks import Features, Network, Wants
from hintjax.sharding import Layout
from hintjax.stages import debugging, entering, optimizer, skipping, start
from hintjax.stages import report as reports
from hintjax.stages.accumulation import (
    divided,
    in_micro_batches,
    itself,
    micro_batch,
    stacked,
)
from hintjax.stages.compiled import Compiled
from hintjax.stages.forward import Plan, features_of_teacher, loss, parts_of
from hintjax.stages.placement import placement
from hintjax.stages.report import Report
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import (
    Batch,
    Carry,
    Choose,
    Given,
    Metrics,
    Parts,
    Stage,
    State,
)


def step(
    plan: Plan, state: State, taught: Features, batch: Batch
) -> tuple[State, Metrics]:
    """Returns the state after one update, and its metrics.

    Args:
        plan: the stage's settings.
        state: the state before the update.
        taught: the teacher's features of the batch.
        batch: the batch.
    """
    entering.check_state(state)
    entering.check_taught(taught)
    entering.check_batch(batch)
    debugging.look("parameters", state.params, state.step)
    (grads, metrics), after, parts = learn(plan, gradients, state, taught, batch)
    debugging.look("gradients", grads, state.step)
    chosen = plan.choose(partial(loss, plan), parts)
    grads = plan.place.grads(grads)
    updates, opt_state = optimizer.updates(
        chosen.transform,
        grads,
        state.opt_state,
        state.params,
        metrics["loss"],
        partial(value, plan, state, taught, batch),
        partial(gradient_of_term, plan, state, taught, batch),
    )
    moved = optax.apply_updates(state.params, updates)
    good, norms, counts = skipping.guard(
        plan.spikes, state.norms, metrics["loss"], grads
    )
    new = state._replace(
        params=_where(chosen.trained, moved, state.params),
        state=_where(chosen.kept, after.state, state.state),
        memory=after.memory,
        opt_state=opt_state,
    )
    new = plan.place.state(keep(plan, good, new, state, batch)._replace(norms=norms))
    skipped = new.skipped.total.astype(metrics["loss"].dtype)
    return new, {**metrics, **counts, "skipped": skipped}


def learn(
    plan: Plan,
    function: Callable[..., tuple[PyTree, Carry]],
    state: State,
    taught: Features,
    batch: Batch,
) -> tuple[PyTree, Carry, Parts]:
    """Returns the result of `function` for a batch, summed over its micro-batches.

    Args:
        plan: the stage's settings.
        function: `(plan, parts, weigh, number) -> (result, carry)`. `weigh` turns a
            mean over the micro-batch into its summand of the mean over the batch;
            `number` is the argument of `loss`.
        state: the state before the update.
        taught: the teacher's features of the batch.
        batch: the batch.

    Returns:
        The result, the carry after the last micro-batch, and the arguments of the loss
        of the first.
    """
    if plan.accumulate == 1:
        parts = parts_of(plan, state, taught, batch)
        return *function(plan, parts, itself, itself), parts
    batch = divided(batch, plan.accumulate, plan.place)
    parts = Parts(
        params=state.params,
        state=state.state,
        memory=state.memory,
        taught=taught,
        batch=batch,
        key=state.key,
        step=state.step,
    )
    return in_micro_batches(partial(function, plan), parts, plan.accumulate, plan.place)


def gradients(
    plan: Plan,
    parts: Parts,
    weigh: Callable[[Array], Array],
    number: Callable[[Array], Array],
) -> tuple[tuple[PyTree, Metrics], Carry]:
    """Returns the gradient of the loss by the parameters, and the metrics.

    Args:
        plan: the stage's settings.
        parts: the arguments of the loss.
        weigh: see `learn`.
        number: see `learn`.
    """

    def weighed(params: PyTree) -> tuple[Array, tuple[Carry, Metrics]]:
        mean, (after, metrics) = loss(
            plan, parts._replace(params=params), train=True, number=number
        )
        return weigh(mean), (after, jax.tree.map(weigh, metrics))

    grads, (after, metrics) = jax.grad(weighed, has_aux=True)(parts.params)
    return (grads, metrics), after


def value(
    plan: Plan, state: State, taught: Features, batch: Batch, params: PyTree
) -> Array:
    """Returns the loss of the step at other parameters, for a line search.

    Args:
        plan: the stage's settings.
        state: the state before the update.
        taught: the teacher's features of the batch.
        batch: the batch.
        params: the parameters.
    """

    def mean(
        plan: Plan, parts: Parts, weigh: Callable[[Array], Array], number: Any
    ) -> tuple[Array, Carry]:
        found, (after, _) = loss(plan, parts, train=True)
        return weigh(found), after

    return learn(plan, mean, state._replace(params=params), taught, batch)[0]


def gradient_of_term(
    plan: Plan, state: State, taught: Features, batch: Batch, term: str
) -> PyTree:
    """Returns the gradient of one term of the objective, with its weight.

    Args:
        plan: the stage's settings.
        state: the state before the update.
        taught: the teacher's features of the batch.
        batch: the batch.
        term: name of the term.

    Raises:
        ValueError: if the method is no objective with such a term.
    """

    def gradient(
        plan: Plan, parts: Parts, weigh: Callable[[Array], Array], number: Any
    ) -> tuple[PyTree, Carry]:
        def of_term(params: PyTree) -> tuple[Array, Carry]:
            _, (after, metrics) = loss(plan, parts._replace(params=params), train=True)
            return weigh(reports.loss_of_term(metrics, term)), after

        return jax.grad(of_term, has_aux=True)(parts.params)

    return plan.place.grads(learn(plan, gradient, state, taught, batch)[0])


def keep(plan: Plan, good: Array, new: State, old: State, batch: Batch) -> State:
    """Returns the new state if the step is good, and else the old one, counted.

    Args:
        plan: the stage's settings.
        good: whether the step is made.
        new: the state after the step.
        old: the state before the step.
        batch: the batch.
    """
    if plan.method.select is None:
        memory = either(good, new.memory, old.memory)
    else:
        shared = plan.place.batch(batch)
        memory = plan.method.select(good, new.memory, old.memory, shared)
    return new._replace(
        params=either(good, new.params, old.params),
        state=either(good, new.state, old.state),
        memory=memory,
        opt_state=either(good, new.opt_state, old.opt_state),
        step=old.step + 1,
        skipped=skipping.counted(old.skipped, good),
    )


def teach(
    plan: Plan, state: State | None, variables: Given | None, batch: Batch
) -> Features:
    """Returns the teacher's features of a batch; of each micro-batch, stacked.

    Args:
        plan: the stage's settings.
        state: the state before the update; this teacher does not read it.
        variables: the teacher's.
        batch: the batch.
    """
    entering.check_batch(batch)
    if plan.accumulate == 1:
        return features_of_teacher(plan, variables, batch)
    batch = divided(batch, plan.accumulate, plan.place)

    def one(i: Array | int) -> Features:
        return features_of_teacher(
            plan, variables, micro_batch(batch, i, plan.accumulate)
        )

    return stacked(one, plan.accumulate, plan.place.layout)


def update(
    plan: Plan, state: State, variables: Given | None, batch: Batch
) -> tuple[State, Metrics]:
    """Returns the state after one update from a batch; `teach`, then `step`.

    Args:
        plan: the stage's settings.
        state: the state before the update.
        variables: the teacher's.
        batch: the batch.
    """
    entering.check_state(state)
    return step(plan, state, teach(plan, state, variables, batch), batch)


def evaluate(
    plan: Plan, state: State, variables: Given | None, batch: Batch
) -> Metrics:
    """Returns the metrics of a batch with `train=False`.

    Args:
        plan: the stage's settings.
        state: the state; it stays as it is.
        variables: the teacher's.
        batch: the batch.
    """
    entering.check_state(state)
    entering.check_batch(batch)
    taught = features_of_teacher(plan, variables, batch)
    parts = parts_of(plan, state, taught, batch)
    _, (_, metrics) = loss(plan, parts, train=False, number=itself)
    return metrics


def report(plan: Plan, state: State, variables: Given | None, batch: Batch) -> Report:
    """Returns losses and gradient norms by term and layer; see `Stage.report`.

    Args:
        plan: the stage's settings.
        state: the state; it stays as it is.
        variables: the teacher's.
        batch: the batch.
    """
    entering.check_state(state)
    taught = teach(plan, state, variables, batch)
    found, _, _ = learn(plan, gradients_by_term, state, taught, batch)
    return reports.report(
        {
            term: (value, plan.place.grads(grads))
            for term, (value, grads) in found.items()
        }
    )


def gradients_by_term(
    plan: Plan, parts: Parts, weigh: Callable[[Array], Array], number: Any
) -> tuple[dict[str, tuple[Array, PyTree]], Carry]:
    """Returns the loss of every term and its gradient by the parameters.

    Args:
        plan: the stage's settings.
        parts: the arguments of the loss.
        weigh: see `learn`.
        number: not used, since a report shows values that are not finite.
    """

    def losses(params: PyTree) -> dict[str, Array]:
        _, (_, metrics) = loss(plan, parts._replace(params=params), train=True)
        return jax.tree.map(weigh, reports.losses_by_term(metrics))

    def one(term: str) -> tuple[Array, PyTree]:
        # Every loss has a backward pass of its own. In one pass for all of them, 0
        # times nan would carry the nan of one term into the others. XLA computes the
        # common part once.
        return jax.value_and_grad(lambda params: losses(params)[term])(parts.params)

    found = {term: one(term) for term in jax.eval_shape(losses, parts.params)}
    _, (after, _) = loss(plan, parts, train=True)
    return found, after


def make_stage(
    student: Network,
    teacher: Network | None,
    method: Method,
    choose: Choose,
    *,
    inputs: Callable[[Batch], PyTree],
    teacher_inputs: Callable[[Batch], PyTree],
    mesh: Mesh | Layout | None,
    accumulate: int,
    spikes: SpikeGuard | None,
) -> Stage:
    """Returns the stage of these settings.

    Args:
        student: the student.
        teacher: the teacher, or None for a method that wants nothing of a teacher.
        method: the method.
        choose: says which arrays the stage changes.
        inputs: see `hint_stage`.
        teacher_inputs: see `hint_stage`.
        mesh: see `hint_stage`.
        accumulate: see `distillation_stage`.
        spikes: see `hint_stage`.

    Raises:
        ValueError: if the method wants a teacher and there is none, or a number is out
            of range.
    """
    positive_int("stage", accumulate=accumulate)
    do = "Give a function of the batch, e.g. lambda batch: batch['image']."
    accepts("stage", ("batch",), (), do, inputs=inputs, teacher_inputs=teacher_inputs)
    do = "Make one with hintjax.make_mesh."
    instance("stage", (Mesh, Layout, NoneType), do, mesh=mesh)
    if spikes is not None:
        skipping.check("stage", spikes)
    if teacher is None and method.teacher != Wants():
        wanted = f"a teacher, since the method wants {method.teacher} of it"
        do = "Pass the teacher's network."
        raise Refusal(message("stage", wanted, "None", do))
    plan = Plan(
        student,
        teacher,
        method,
        choose,
        inputs,
        teacher_inputs,
        placement(mesh, method),
        accumulate,
        spikes,
    )
    # The jit is made once, so that a second initialization compiles nothing.
    fresh = jax.jit(partial(start.fresh, plan))
    return Stage(
        init=partial(start.init, plan, fresh),
        teach=partial(teach, plan),
        step=partial(step, plan),
        update=_compiled(plan, update, True),
        evaluate=_compiled(plan, evaluate, False),
        report=_compiled(plan, report, False),
    )


def _compiled(plan: Plan, function: Callable[..., Any], moves: bool) -> Compiled:
    """The jit of a function of the plan; only one that moves the state trains."""
    jitted = plan.place.jit(partial(function, plan), moves)
    return Compiled(jitted, plan.method.limits if moves else None)


def check_kinds(
    caller: str, student: Any, teacher: Any, method: Any, transform: Any
) -> None:
    """Raises unless all arguments of a stage have their types, and so their places.

    Args:
        caller: name of the function that the user called.
        student: should be a `Network`.
        teacher: should be a `Network` or None.
        method: should be a `Method`.
        transform: should be an optax transformation.
    """
    do = "Make it one with hintjax.linen, hintjax.nnx or hintjax.function."
    instance(caller, Network, do, student=student)
    instance(caller, (Network, NoneType), do, teacher=teacher)
    instance(caller, Method, method=method)
    do = "optax.MultiSteps is one after .gradient_transformation()."
    do = do if isinstance(transform, optax.MultiSteps) else ""
    instance(caller, optax.GradientTransformation, do, optimizer=transform)


def _where(chosen: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """The new arrays where chosen, and the very same old ones elsewhere."""
    return jax.tree.map(lambda c, n, o: n if c else o, chosen, new, old)
