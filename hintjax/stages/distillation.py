"""The distillation stage."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from hintjax.method import Method
from hintjax.networks import Network, Wants
from hintjax.sharding import Layout
from hintjax.stages.dependency import reads
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import Batch, Stage, image
from hintjax.stages.update import check_kinds, make_stage


def distillation_stage(
    student: Network,
    teacher: Network | None,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    rates: Mapping[str, float] | None = None,
    inputs: Callable[[Batch], PyTree] = image,
    teacher_inputs: Callable[[Batch], PyTree] = image,
    mesh: Mesh | Layout | None = None,
    accumulate: int = 1,
    spikes: SpikeGuard | None = None,
) -> Stage:
    """The distillation stage: trains the whole student, and the regressors.

    Args:
        student: the student.
        teacher: the teacher; None for a method that wants nothing of it, such as
            the task alone (this is how a teacher is trained).
        method: usually an objective of the task and distillation terms.
        optimizer: the optimiser of this stage.
        rates: learning-rate multipliers by path of a layer: the updates of all
            parameters that feed it are multiplied (FitNets' `lr_scale` for the
            layers that the hint stage trained). Where layers overlap, so do the
            factors.
        inputs: what the student sees of a batch.
        teacher_inputs: what the teacher sees of a batch.
        mesh: see `hint_stage`.
        accumulate: how many micro-batches of equal size an update is made of, one after
            another, so that only one needs its activations at a time. It must divide
            the batch; on a mesh, the examples of each device.

            The update is that of the whole batch, but for rounding, where each example
            has a loss of its own; "where" may leave any of them out. It is another one
            where the examples of a batch are compared, which now are those of a
            micro-batch: in `correlation_congruence`, `crd`, `dist`,
            `probability_transfer`, `relational` and `similarity_preserving`; in
            BatchNorm, be it the student's or that of regressors, as
            `activation_boundary`, `factor_transfer`, `overhaul`, `review` and `simkd`
            have it, and `fitnets` if asked to. What is random is drawn for each
            micro-batch: dropout, `masked_generation`, the negatives of `crd`.
            Statistics and memory go from each micro-batch to the next, and metrics are
            means over the examples of what each reports. A mesh sums the gradients of
            each micro-batch over its devices.
        spikes: skips steps whose gradient is far longer than usual.

    Returns:
        The stage.

    Raises:
        ValueError: if the method wants a teacher and there is none, or a rate is
            negative.

    References:
        Romero et al. 2015, FitNets, stage 2 (Eq. 2).
    """
    check_kinds("distillation_stage", method, optimizer)
    rates = dict(rates or {})
    if any(not rate >= 0 for rate in rates.values()):
        raise ValueError(
            f"distillation_stage: expected rates >= 0, got {rates}. Use 0 to freeze."
        )

    optimiser = partial(multiplied, optimizer, student, inputs, rates)
    seen = inputs, teacher_inputs
    more = mesh, accumulate, spikes
    return make_stage(student, teacher, method, optimiser, *seen, *more)


def multiplied(
    optimizer: optax.GradientTransformation,
    student: Network,
    inputs: Callable[[PyTree], PyTree],
    rates: Mapping[str, float],
    objective: Callable,
    params: PyTree,
    model_state: PyTree,
    memory: PyTree,
    taught: PyTree,
    batch: PyTree,
    *others: PyTree,
) -> tuple[optax.GradientTransformation, PyTree, PyTree]:
    """An optimiser of everything, whose updates of what feeds some layers are scaled.

    Args:
        optimizer: before it is scaled.
        student: the student.
        inputs: what it sees of a batch.
        rates: factors by path of a layer.
        objective: as for `only_what_feeds`; not looked at.
        params, model_state, memory, taught, batch, *others: its arguments.

    Returns:
        As `only_what_feeds`.
    """

    def feeds(path):
        def hint(weights, model_state, batch, key):
            wants = Wants(hints=(path,))
            seen = inputs(batch)
            shown, _ = student.apply(
                weights, model_state, seen, wants=wants, train=True, key=key
            )
            return shown.hints[path]

        parts = (params["student"], model_state, batch, others[0])
        nowhere = jax.tree.map(lambda _: False, params)
        return {**nowhere, "student": reads(hint, 0, parts)}

    multipliers = [
        optax.masked(optax.scale(rate), feeds(path)) for path, rate in rates.items()
    ]
    everything = jax.tree.map(lambda _: True, (params, model_state))
    return optax.chain(optimizer, *multipliers), *everything
