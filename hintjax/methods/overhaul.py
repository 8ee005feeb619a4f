"""OFD: the overhaul of feature distillation (Heo et al. 2019)."""

from collections.abc import Sequence
from functools import partial, reduce

from jaxtyping import Array

from hintjax import regressors
from hintjax._checks import Refusal, function, instance, message
from hintjax.losses import batch_norm_margin, margin_relu, partial_l2_loss
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked
from hintjax.networks import Features

CONNECTOR = partial(regressors.linear, batch_norm=True, bias=False)


def overhaul(
    pairs: Pairs,
    norms: Sequence[str] | None = None,
    *,
    regressor: regressors.Sizing = CONNECTOR,
) -> Method:
    """OFD: the student's features before the ReLU match the teacher's margin ReLU.

    The margins come from the teacher's BatchNorm before the ReLU: a margin is the mean
    of the negative values there. If sizes differ, the larger map is first averaged to
    the smaller size. The usual setting pairs the ends of the three stages of a residual
    network, *before* their ReLU, at weight 1e-3.

    values = sum_i 2^(i - n + 1) L_i,  i = 0 .. n - 1, shallow to deep

    Args:
        pairs: (guided layer, hint layer) for each pair, shallow to deep, as paths.
        norms: path of the teacher's BatchNorm for each pair; by default the hint layers
            themselves. For a residual sum, give the last BatchNorm of its branch.
        regressor: makes the regressor of one pair; by default a 1x1 convolution and
            BatchNorm.

    Returns:
        The method. It trains one regressor per pair, named `guided->hint`, and
        remembers their BatchNorm statistics.

    Raises:
        ValueError: if there are no pairs, if there is not one BatchNorm for each pair,
            or (when a stage is initialized) if a layer in `norms` has no scale and
            bias.

    References:
        Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation.
    """
    student_wants, teacher_wants = hints_of("overhaul", pairs)
    function("overhaul", regressor=regressor)
    norms = teacher_wants.hints if norms is None else norms
    instance("overhaul", Sequence, norms=norms)
    instance("overhaul", str, **{f"norms[{i}]": path for i, path in enumerate(norms)})
    norms = tuple(norms)
    if len(norms) != len(pairs):
        wanted = f"norms to have one path for each of {len(pairs)} pairs"
        raise Refusal(message("overhaul", wanted, f"{norms}"))

    beside = _regressed.beside(pairs, regressor)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        for path in norms:
            found = teacher.params[path]
            if not {"scale", "bias"} <= set(found):
                wanted = f"the teacher's {path!r} to be a BatchNorm with scale and bias"
                do = "Pass the path of the BatchNorm before the ReLU in norms=."
                raise Refusal(message("overhaul", wanted, f"{list(found)}", do))
        return beside.init(key, student, teacher, data)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        predictions, memory = beside.predict(
            params, memory, student, teacher, context.train
        )
        losses = []
        for (_, predicted, hint), path in zip(predictions, norms, strict=True):
            norm = teacher.params[path]
            margin = batch_norm_margin(norm["scale"], norm["bias"])
            target = margin_relu(hint, margin)
            losses.append(partial_l2_loss(predicted, target))
        # A loss is halved once for each deeper pair.
        return reduce(lambda total, loss: total / 2 + loss, losses), memory, {}

    teacher_wants = teacher_wants._replace(params=tuple(dict.fromkeys(norms)))
    method = Method(student_wants, teacher_wants, init, apply)
    return checked("overhaul", pairs, method)
