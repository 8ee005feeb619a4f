"""FitNets: hints (Romero et al. 2015)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from hintjax import regressors
from hintjax._checks import (
    Refusal,
    function,
    integer,
    mask,
    message,
    not_negative,
    positive_int,
    rank,
    same_shape,
)
from hintjax._numerics import as_float, keep, masked_mean
from hintjax.losses import hint_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of, total
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked
from hintjax.methods._tokens import counted
from hintjax.networks import Features


def fitnets(
    pairs: Pairs,
    *,
    regressor: regressors.Sizing = regressors.fit,
    loss: Callable[..., Float[Array, " batch"]] = hint_loss,
    padding: str | None = None,
) -> Method:
    """FitNets: a regressor on the guided layer predicts the hint layer.

    FitNets trains in two stages. This method in a hint stage is the first one. As a
    term beside the task in a distillation stage, it is the "FitNet" of benchmarks
    (weight 100,
    `regressor=partial(regressors.conv, batch_norm=True, activation=nn.relu)`).
    The paper pairs the middle of the teacher with the middle of the student.

    The losses of the pairs are summed. The pairs are evaluated one after another
    inside one jit: a vmap over pairs would have to copy the feature maps.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths.
        regressor: makes the regressor of one pair from the two shapes.
        loss: compares a prediction with its hint, one value per example. With
            `padding`, it also receives the mask of valid tokens, as `where`.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method. It trains one regressor per pair, named `guided->hint`;
        remembers their BatchNorm statistics; reports `r2`, the fraction of the hint's
        variance that is predicted (per channel, over the batch), as the mean over
        pairs. With several pairs it also reports the `loss` and `r2` of each pair.

    Raises:
        ValueError: if there are no pairs; when a stage is initialized, if no regressor
            fits a pair; if the batch has no such mask.

    References:
        Romero et al. 2015, FitNets: Hints for Thin Deep Nets.
    """
    function("fitnets", regressor=regressor, loss=loss)
    student_wants, teacher_wants = hints_of("fitnets", pairs)
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
        values, metrics = scored("fitnets", predictions, loss, batch, padding)
        return values, memory, metrics

    method = Method(student_wants, teacher_wants, init, apply)
    # A loss of the user may take other shapes, such as layers that a scan has stacked.
    return checked("fitnets", pairs, method) if loss is hint_loss else method


def scored(
    caller: str,
    predictions: list[tuple[str, Array, Array]],
    loss: Callable[..., Float[Array, " batch"]],
    batch: Batch,
    padding: str | None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """The summed losses of the predictions of hints, and how good they are.

    Args:
        caller: the name of the method, for messages.
        predictions: the name, the prediction and the hint of each pair.
        loss: see `fitnets`.
        batch: the batch.
        padding: see `fitnets`.

    Returns:
        One value per example, and the metrics of `fitnets`.
    """
    parts, losses, r2 = [], {}, {}
    where, tokens = batch.get("where"), counted(caller, batch, padding)
    told = {} if padding is None else {"where": tokens}
    for name, predicted, hint in predictions:
        values = loss(predicted, hint, **told)
        parts.append(values)
        losses[name] = masked_mean(values, where)
        r2[name] = explained_variance(predicted, hint, tokens)
    metrics = {"r2": total(r2.values()) / len(r2)}
    if len(losses) > 1:
        metrics |= {f"{name}/loss": value for name, value in losses.items()}
        metrics |= {f"{name}/r2": value for name, value in r2.items()}
    return total(parts), metrics


def lambda_decay(
    initial: float, final: float, start: int, saturate: int, steps_per_epoch: int
) -> Callable[[Array], Float[Array, ""]]:
    """FitNets' decay of the weight of the soft targets, as a schedule of the step.

    With `d = (initial - final) / (saturate - start + 1)` and the epoch e from 0::

        lambda(e) = initial                          e < start
                    initial - d (e - start + 1)      start <= e < saturate
                    final                            saturate <= e

    Args:
        initial: the weight before the decay; the paper's 4.
        final: the weight after the decay; the paper's 1.
        start: the first epoch of the decay.
        saturate: the first epoch of the final weight.
        steps_per_epoch: number of optimizer steps in an epoch.

    Returns:
        `step -> weight`, constant within an epoch.

    Raises:
        ValueError: if `saturate < start` or `steps_per_epoch < 1`.

    >>> decay = lambda_decay(4.0, 1.0, start=1, saturate=3, steps_per_epoch=10)
    >>> [float(decay(10 * epoch)) for epoch in range(5)]
    [4.0, 3.0, 2.0, 1.0, 1.0]

    References:
        Romero et al. 2015, section 3.1 and code (TeacherDecayOverEpoch).
    """
    not_negative("lambda_decay", initial=initial, final=final)
    integer("lambda_decay", 0, start=start, saturate=saturate)
    positive_int("lambda_decay", steps_per_epoch=steps_per_epoch)
    if saturate < start:
        got, do = f"{start} and {saturate}", "Give the epochs in ascending order."
        raise Refusal(message("lambda_decay", "start <= saturate", got, do))
    drop = (initial - final) / (saturate - start + 1)

    def schedule(step: ArrayLike) -> Array:
        epoch = jnp.asarray(step) // steps_per_epoch
        decayed = initial - drop * (epoch - start + 1).astype(jnp.float32)
        late = jnp.where(epoch < saturate, decayed, final)
        return jnp.where(epoch < start, initial, late)

    return schedule


def explained_variance(
    predicted: Float[Array, "batch ..."],
    target: Float[Array, "batch ..."],
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """R^2: the fraction of the target's variance that is predicted.

    `1 - sum (t - p)^2 / sum (t - mean t)^2`, the mean per channel over the valid
    examples and positions; 0 for a target that does not vary.

    Args:
        predicted: the regressor's output.
        target: the hint.
        where: mask of valid examples, or of valid positions, over the first axes. By
            default all are valid.

    Returns:
        At most 1. It is negative if the mean is a better prediction.

    >>> t = jnp.arange(6.0).reshape(3, 2)
    >>> float(explained_variance(t, t)), float(explained_variance(t * 0 + 2.5, t))
    (1.0, -0.09375)
    """
    caller = "explained_variance"
    predicted, target = as_float(caller, predicted), as_float(caller, target)
    rank(caller, 1, "batch ...", target=target)
    same_shape(caller, predicted=predicted, target=target)
    mask(caller, where, *(target.shape[:n] for n in range(1, target.ndim + 1)))
    axes = tuple(range(target.ndim - 1))
    count = keep(jnp.ones_like(target), where).sum(axes, keepdims=True)
    mean = keep(target, where).sum(axes, keepdims=True) / jnp.maximum(count, 1)
    left = jnp.square(keep(target - predicted, where)).sum()
    whole = jnp.square(keep(target - mean, where)).sum()
    return jnp.where(whole > 0, 1 - left / jnp.where(whole > 0, whole, 1), 0)
