"""VID: variational information distillation (Ahn et al. 2019)."""

import math
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from hintjax import regressors
from hintjax._checks import function, scalar
from hintjax.losses.variational import LEAST_VARIANCE, variance_of, variational_loss
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of, total
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked
from hintjax.methods._tokens import counted
from hintjax.networks import Features

MOST_VARIANCE = 700.0  # largest initial variance: expm1 of more overflows
MEAN = partial(regressors.mlp, depth=2, bias=False)


def variational(
    pairs: Pairs,
    *,
    regressor: regressors.Sizing = MEAN,
    initial_variance: float = 5.0,
    padding: str | None = None,
) -> Method:
    """VID: the student predicts each hint's mean, and how well it can per channel.

    A regressor predicts the mean of the hint layer. A trained parameter for each
    channel gives the variance. If sizes differ, the larger map is first averaged to the
    smaller size. The usual setting pairs the three stages of a residual network at
    weight 1; their losses are summed.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths.
        regressor: makes the regressor of the mean; by default the published three 1x1
            convolutions with ReLUs between them, without biases.
        initial_variance: the initial variance of all channels, > 1e-5 and < 700.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel, at the smaller size of each
            pair. By default all positions are valid.

    Returns:
        The method. It trains a regressor `mean` and the numbers `scale` per pair, under
        `guided->hint`; it reports the mean `variance` over pairs and channels.
        (mdistiller does not pass these numbers to its optimizer.)

    Raises:
        ValueError: if there are no pairs, if the variance is outside its range, or
            (when a stage is initialized) if no regressor fits a pair; if the batch has
            no such mask.

    References:
        Ahn et al. 2019, Variational Information Distillation for Knowledge Transfer.
    """
    function("variational", regressor=regressor)
    scalar(
        "variational",
        f"to be > {LEAST_VARIANCE} and < {MOST_VARIANCE}",
        lambda variance: LEAST_VARIANCE < variance < MOST_VARIANCE,
        initial_variance=initial_variance,
    )
    student_wants, teacher_wants = hints_of("variational", pairs)
    initial_scale = math.log(math.expm1(initial_variance - LEAST_VARIANCE))

    beside = _regressed.beside(pairs, regressor)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        means, memory = beside.init(key, student, teacher, data)
        ready = _regressed.ready(pairs, regressor, student, teacher)
        scales = {pair.name: pair.hint.shape[-1:] for pair in ready}
        params = {
            name: {
                "mean": mean,
                "scale": jnp.full(scales[name], initial_scale, jnp.float32),
            }
            for name, mean in means.items()
        }
        return params, memory

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        means = {name: own["mean"] for name, own in params.items()}
        predictions, memory = beside.predict(
            means, memory, student, teacher, context.train
        )
        masked = {}
        if padding is not None:
            masked["where"] = counted("variational", batch, padding)
        values = [
            variational_loss(predicted, hint, scale=params[name]["scale"], **masked)
            for name, predicted, hint in predictions
        ]
        variances = [jnp.mean(variance_of(own["scale"])) for own in params.values()]
        variance = total(variances) / len(variances)
        return total(values), memory, {"variance": variance}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked("variational", pairs, method)
