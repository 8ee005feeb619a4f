"""VkD: an orthogonal projector and a normalized teacher (Miles et al. 2024)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax import regressors
from hintjax._checks import function
from hintjax._numerics import as_float
from hintjax.losses import layer_normalize, smooth_l1_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked
from hintjax.methods.fitnets import scored
from hintjax.networks import Features


def orthogonal_projection(
    pairs: Pairs,
    *,
    regressor: regressors.Sizing = regressors.orthogonal,
    loss: Callable[..., Float[Array, " batch"]] = smooth_l1_loss,
) -> Method:
    """VkD: the student's pooled features, rotated, predict the teacher's.

    L = smooth_l1(W mean_j s_j, LN(mean_j t_j)),  W^T W = I (or W W^T = I)

    A projector that can only rotate cannot learn the task in the student's place, and
    the layer norm of the teacher's features gives all examples the same weight. No
    labels are needed; VkD adds the task for classification.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps and tokens are
            averaged over their positions. The losses of the pairs are summed.
        regressor: makes the regressor of one pair.
        loss: compares a prediction with its hint, one value per example.

    Returns:
        The method. It trains one regressor per pair, named `guided->hint`, and reports
        `r2` as `fitnets` does.

    Raises:
        ValueError: if there are no pairs, or a layer has no features.

    Convention:
        `.mean()` is the representation loss of the authors' code, with weight 1.

    References:
        Miles, Elezi, Deng 2024, VkD: Improving Knowledge Distillation using Orthogonal
        Projections, and code (engine.py).
    """
    caller = "orthogonal_projection"
    function(caller, regressor=regressor, loss=loss)
    student_wants, teacher_wants = hints_of(caller, pairs)
    init, predict = _regressed.beside(pairs, regressor, _pooled)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        predictions, memory = predict(params, memory, student, teacher, context.train)
        values, metrics = scored(caller, predictions, loss, batch, None)
        return values, memory, metrics

    method = Method(student_wants, teacher_wants, init, apply)
    return checked(caller, pairs, method)


def _pooled(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Returns the means over positions, the teacher's normalized."""
    guided, hint = (
        jnp.mean(as_float("orthogonal_projection", x), tuple(range(1, x.ndim - 1)))
        for x in (guided, hint)
    )
    return guided, layer_normalize(hint)
