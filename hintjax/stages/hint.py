"""The hint stage: FitNets' first stage, which trains the student up to its hints."""

from collections.abc import Callable, Hashable
from functools import partial

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from hintjax._checks import Refusal, message
from hintjax.method import Method
from hintjax.networks import Network
from hintjax.sharding import Layout
from hintjax.stages.dependency import differentiated, reads
from hintjax.stages.skipping import SpikeGuard
from hintjax.stages.stage import Batch, Chosen, Parts, Stage, image
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
    """Returns the hint stage: it trains the regressors and the layers below the hints.

    The parameters of the student that a gradient of the loss reaches are read off the
    traced program. All others are frozen (`optax.partition`, `set_to_zero`): they get
    no gradient, no weight decay and no optimizer state. BatchNorm statistics move
    exactly where they feed a hint. The stage returns nothing from above the hints, so
    XLA does not compute it: neither the forward nor the backward pass, and not in the
    teacher either.

    Args:
        student: the student.
        teacher: the teacher.
        method: for example `fitnets(pairs)`, or an objective of such terms.
        optimizer: the optimizer of this stage.
        inputs: `(batch) -> inputs` of the student.
        teacher_inputs: `(batch) -> inputs` of the teacher.
        mesh: the devices of the stage, one device by default. On a mesh the batch is
            split over the axes `data` and `fsdp`. Parameters and optimizer state are on
            every device or stored in shares, as a `hintjax.sharding.Layout` says (a
            mesh alone has the default layout). All other arrays are on every device.
            `hintjax.sharding.place` sends the teacher's variables there once.
        accumulate: number of micro-batches in an update; see `distillation_stage`.
        spikes: a guard that skips steps whose gradient is far longer than usual.

    Returns:
        The stage.

    Raises:
        ValueError: if the method wants the student's output, which is a loss for the
            distillation stage.

    References:
        Romero et al. 2015, FitNets, stage 1 (Eq. 3).
    """
    check_kinds("hint_stage", student, teacher, method, optimizer)
    if method.student.output:
        wanted, got = "a method of hints alone", "one that wants the student's output"
        do = "Train it in a distillation_stage."
        raise Refusal(message("hint_stage", wanted, got, do))
    return make_stage(
        student,
        teacher,
        method,
        partial(only_what_feeds, optimizer),
        inputs=inputs,
        teacher_inputs=teacher_inputs,
        mesh=mesh,
        accumulate=accumulate,
        spikes=spikes,
    )


def only_what_feeds(
    optimizer: optax.GradientTransformation, loss: Callable, parts: Parts
) -> Chosen:
    """Chooses the parameters that a gradient of the loss reaches; others are frozen.

    Args:
        optimizer: the optimizer of the trained parameters.
        loss: `(parts, train=) -> (loss, ...)`.
        parts: the arguments of the loss, or their shapes.
    """

    def learned(params: PyTree, others: Parts) -> Array:
        return loss(others._replace(params=params), train=True)[0]

    def judged(parts: Parts) -> Array:
        return loss(parts, train=False)[0]

    learning = differentiated(learned, parts.params, parts)
    trained = learning.changes(lambda path: True).changes
    learning, judging = learning.values(lambda path: True).fixed, reads(judged, parts)
    labels = jax.tree.map(lambda t: "trained" if t else "frozen", trained)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "trained": optimizer,
        "frozen": optax.set_to_zero(),
    }
    # BatchNorm does not read its statistics in training: evaluation says which count.
    kept = jax.tree.map(lambda *read: any(read), learning.state, judging.state)
    # The mask of the gradients is that of an optimizer's extra argument `grad`, too.
    chosen = optax.partition(transforms, labels, mask_compatible_extra_args=True)
    return Chosen(chosen, trained, kept)
