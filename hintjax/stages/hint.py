"""The hint stage."""

from collections.abc import Callable
from functools import partial

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from hintjax.method import Method
from hintjax.networks import Network
from hintjax.sharding import Layout
from hintjax.stages.dependency import reads
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import Batch, Stage, image
from hintjax.stages.update import check_kinds, make_stage


def hint_stage(
    student: Network,
    teacher: Network,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    inputs: Callable[[Batch], PyTree] = image,
    teacher_inputs: Callable[[Batch], PyTree] = image,
    mesh: Mesh | Layout | None = None,
    accumulate: int = 1,
    spikes: SpikeGuard | None = None,
) -> Stage:
    """The hint stage: trains what feeds the guided layers, and the regressors.

    Which parameters of the student feed the loss is read off the traced program.
    The others are frozen (`optax.partition`, `set_to_zero`): no gradient, no weight
    decay and no optimiser state reaches them. BatchNorm's statistics move exactly
    where they feed a hint. Since nothing above the hints is returned, XLA does not
    compute it: forward, backward, or in the teacher.

    Args:
        student: the student.
        teacher: the teacher.
        method: for instance `fitnets(pairs)`, or an objective of such terms.
        optimizer: the optimiser of this stage.
        inputs: what the student sees of a batch.
        teacher_inputs: what the teacher sees of a batch.
        mesh: the batch is split over its axes `data` and `fsdp`; parameters and
            the optimiser's state are on all devices or stored in shares, as a
            `hintjax.sharding.Layout` says (a mesh alone is the default layout); all
            else is replicated. `hintjax.sharding.place` puts the teacher there once.
            One device by default.
        accumulate: micro-batches in an update; see `distillation_stage`.
        spikes: skips steps whose gradient is far longer than usual.

    Returns:
        The stage.

    Raises:
        ValueError: if the method wants the student's output: that is a loss for
            the distillation stage.

    References:
        Romero et al. 2015, FitNets, stage 1 (Eq. 3).
    """
    check_kinds("hint_stage", method, optimizer)
    if method.student.output:
        raise ValueError(
            "hint_stage: expected a method of hints alone, got one that wants the "
            "student's output. Train it in a distillation_stage."
        )

    optimiser = partial(only_what_feeds, optimizer)
    seen = inputs, teacher_inputs
    more = mesh, accumulate, spikes
    return make_stage(student, teacher, method, optimiser, *seen, *more)


def only_what_feeds(
    optimizer: optax.GradientTransformation, objective: Callable, *parts: PyTree
) -> tuple[optax.GradientTransformation, PyTree, PyTree]:
    """An optimiser of the parameters that feed an objective; the others are frozen.

    Args:
        optimizer: of what is trained.
        objective: `(*parts, train=) -> (loss, ...)`.
        *parts: its arguments, or their shapes: parameters, the student's state, others.

    Returns:
        The optimiser, which parameters it changes, and which of the state is kept.
    """

    def loss(*parts, train):
        return objective(*parts, train=train)[0]

    learning = partial(loss, train=True)
    trained = reads(learning, 0, parts)
    labels = jax.tree.map(lambda t: "trained" if t else "frozen", trained)
    transforms = {"trained": optimizer, "frozen": optax.set_to_zero()}
    # While training BatchNorm reads no statistics: evaluation says which count.
    kept = jax.tree.map(
        lambda *read: any(read),
        reads(learning, 1, parts),
        reads(partial(loss, train=False), 1, parts),
    )
    return optax.partition(transforms, labels), trained, kept
