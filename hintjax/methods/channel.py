"""CWD: channel-wise distillation (Shu et al. 2021)."""

from functools import partial

from hintjax import regressors
from hintjax._checks import function, positive
from hintjax.losses import channel_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of, total
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked, maps, places
from hintjax.methods._tokens import counted
from hintjax.networks import Features


def channel_wise(
    pairs: Pairs,
    *,
    temperature: float = 1.0,
    regressor: regressors.Sizing = regressors.identity,
    padding: str | None = None,
) -> Method:
    """CWD: each channel is active at the same positions (see `channel_loss`).

    The published setting directly compares the logit maps of two segmentation networks,
    at weight 5 (MMRazor). Feature maps with unequal channels or sizes need a regressor,
    for instance `regressors.fit`.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c),
            tokens (n, c) or volumes (d, h, w, c). The losses of the pairs are summed.
        temperature: the temperature of the softmax over positions, > 0.
        regressor: makes the regressor of one pair; by default there is none.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method. It trains one regressor per pair if one is given, named
        `guided->hint`, and remembers their BatchNorm statistics.

    Raises:
        ValueError: if there are no pairs, if the temperature is not positive, (when a
            stage is initialized) if shapes differ and there is no regressor or if a
            layer has no positions, or if the batch has no such mask.

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
        where = counted("channel_wise", batch, padding)
        loss = partial(channel_loss, temperature=temperature, where=where)
        values = [loss(predicted, hint) for _, predicted, hint in predictions]
        return total(values), memory, {}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked("channel_wise", pairs, method, maps, places)
