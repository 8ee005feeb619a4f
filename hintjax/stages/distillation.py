"""The distillation stage: FitNets' second stage, which trains the whole student."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from hintjax._checks import Refusal, message
from hintjax.method import Method
from hintjax.networks import Network, Wants
from hintjax.sharding import Layout
from hintjax.stages.dependency import reads
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import Batch, Chosen, Parts, Stage, image
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
    """Returns the distillation stage: it trains the whole student and the regressors.

    Args:
        student: the student.
        teacher: the teacher; None for a method that wants nothing of a teacher, such as
            the task alone. A teacher itself is trained this way.
        method: usually an objective of the task and distillation terms.
        optimizer: the optimizer of this stage.
        rates: learning-rate multipliers by path of a layer: they multiply the updates
            of all parameters that feed the layer (FitNets' `lr_scale` for the layers
            that the hint stage trained). Where the layers overlap, the factors multiply
            each other.
        inputs: `(batch) -> inputs` of the student.
        teacher_inputs: `(batch) -> inputs` of the teacher.
        mesh: the devices of the stage; see `hint_stage`.
        accumulate: number of micro-batches of equal size in an update. They are
            computed one after another, so that only one needs memory for its
            activations at a time. The number must divide the batch; on a mesh, the
            examples of each device.

            The update equals that of the whole batch up to rounding if every example
            has a loss of its own; "where" may leave any example out. For losses that
            compare examples with each other the result differs: they are compared
            within a micro-batch. These are `correlation_congruence`, `crd`, `dist`,
            `probability_transfer`, `relational` and `similarity_preserving`;
            `queue_similarity`, whose queue changes with each micro-batch; and
            BatchNorm in the student or in the regressors: `activation_boundary`,
            `factor_transfer`, `overhaul`, `review` and `simkd` have it, and `fitnets`
            on request. Random numbers are drawn for each micro-batch: dropout,
            `masked_generation`, the negatives of `crd`. Statistics and memory go from
            each micro-batch to the next, and metrics are means over all examples. A
            mesh sums the gradients of each micro-batch over its devices.
        spikes: a guard that skips steps whose gradient is far longer than usual.

    Returns:
        The stage.

    Raises:
        ValueError: if the method wants a teacher and there is none, or a rate is
            negative.

    References:
        Romero et al. 2015, FitNets, stage 2 (Eq. 2).
    """
    check_kinds("distillation_stage", student, teacher, method, optimizer)
    rates = dict(rates or {})
    if any(not rate >= 0 for rate in rates.values()):
        do = "Use 0 to freeze."
        raise Refusal(message("distillation_stage", "rates >= 0", f"{rates}", do))
    return make_stage(
        student,
        teacher,
        method,
        partial(multiplied, optimizer, student, inputs, rates),
        inputs=inputs,
        teacher_inputs=teacher_inputs,
        mesh=mesh,
        accumulate=accumulate,
        spikes=spikes,
    )


def multiplied(
    optimizer: optax.GradientTransformation,
    student: Network,
    inputs: Callable[[Batch], PyTree],
    rates: Mapping[str, float],
    loss: Callable,
    parts: Parts,
) -> Chosen:
    """Chooses all parameters, and scales the updates of those that feed some layers.

    Args:
        optimizer: the optimizer before the updates are scaled.
        student: the student.
        inputs: `(batch) -> inputs` of the student.
        rates: factors by path of a layer.
        loss: not used; every stage chooses from the same arguments.
        parts: the arguments of the loss, or their shapes.
    """

    def feeds(path: str) -> PyTree:
        def hint(parts: Parts) -> PyTree:
            shown, _ = student.apply(
                parts.params["student"],
                parts.state,
                inputs(parts.batch),
                wants=Wants(hints=(path,)),
                train=True,
                key=parts.key,
            )
            return shown.hints[path]

        return reads(hint, parts).params

    multipliers = [
        optax.masked(optax.scale(rate), feeds(path)) for path, rate in rates.items()
    ]
    everything = jax.tree.map(lambda _: True, (parts.params, parts.state))
    return Chosen(optax.chain(optimizer, *multipliers), *everything)
