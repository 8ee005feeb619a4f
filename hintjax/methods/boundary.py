"""AB: transfer of activation boundaries (Heo et al. 2019)."""

from functools import partial, reduce

from hintjax import regressors
from hintjax._checks import function, positive
from hintjax.losses import activation_boundary_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked
from hintjax.networks import Features

SCALE = 3 / 1000  # factor of the last pair's loss, as published
CONNECTOR = partial(regressors.conv, batch_norm=True)


def activation_boundary(
    pairs: Pairs,
    *,
    margin: float = 1.0,
    regressor: regressors.Sizing = CONNECTOR,
) -> Method:
    """AB: behind a regressor, the student's neurons switch on where the teacher's do.

    It initializes the student: first a hint stage with this method alone (weight 1, 30
    epochs in the CRD benchmark), then a distillation stage on the task. The usual
    layers are the three stages of a residual network, *before* the ReLU.

    values = 3/1000 sum_i 2^(i - n + 1) L_i,  i = 0 .. n - 1, shallow to deep

    Args:
        pairs: (guided layer, hint layer) for each pair, shallow to deep, as paths.
        margin: the distance from the boundary that the student should keep, > 0.
        regressor: makes the regressor of one pair; by default a convolution and
            BatchNorm, without a non-linearity. (Between layers of equal shape, the
            benchmark has no regressor: `regressors.identity`.)

    Returns:
        The method. It trains one regressor per pair, named `guided->hint`, and
        remembers their BatchNorm statistics.

    Raises:
        ValueError: if there are no pairs, if the margin is not positive, or (when a
            stage is initialized) if no regressor fits a pair.

    References:
        Heo et al. 2019, Knowledge Transfer via Distillation of Activation Boundaries
        Formed by Hidden Neurons.
    """
    positive("activation_boundary", margin=margin)
    function("activation_boundary", regressor=regressor)
    student_wants, teacher_wants = hints_of("activation_boundary", pairs)
    init, predict = _regressed.beside(pairs, regressor, _regressed.as_they_are)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        predictions, memory = predict(params, memory, student, teacher, context.train)
        losses = (
            SCALE * activation_boundary_loss(predicted, hint, margin=margin)
            for _, predicted, hint in predictions
        )
        # A loss is halved once for each deeper pair.
        return reduce(lambda total, loss: total / 2 + loss, losses), memory, {}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked("activation_boundary", pairs, method)
