"""CWD: channel-wise distillation (Shu et al. 2021)."""

from functools import partial

from hintjax import regressors
from hintjax._checks import function, positive
from hintjax.losses import channel_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of, total
from hintjax.methods import _regressed
from hintjax.networks import Features


def channel_wise(
    pairs: Pairs,
    *,
    temperature: float = 1.0,
    regressor: regressors.Sizing = regressors.identity,
) -> Method:
    """CWD: each channel is active at the same positions (see `channel_loss`).

    The published setting directly compares the logit maps of two segmentation networks,
    at weight 5 (MMRazor). Feature maps with unequal channels or sizes need a regressor,
    for instance `regressors.fit`.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of
            the pairs are summed.
        temperature: the temperature of the softmax over positions, > 0.
        regressor: makes the regressor of one pair; by default there is none.

    Returns:
        The method. It trains one regressor per pair if one is given, named
        `guided->hint`, and remembers their BatchNorm statistics.

    Raises:
        ValueError: if there are no pairs, if the temperature is not positive, or (when
            a stage is initialized) if shapes differ and there is no regressor.

    References:
        Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction.
    """
    positive("channel_wise", temperature=temperature)
    function("channel_wise", regressor=regressor)
    student_wants, teacher_wants = hints_of("channel_wise", pairs)
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
        loss = partial(channel_loss, temperature=temperature, where=batch.get("where"))
        values = [loss(predicted, hint) for _, predicted, hint in predictions]
        return total(values), memory, {}

    return Method(student_wants, teacher_wants, init, apply)
