"""ReviewKD: knowledge review (Chen et al. 2021)."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from hintjax import regressors
from hintjax._checks import Refusal, function, message, not_negative, positive_int
from hintjax._numerics import masked_mean
from hintjax.losses import hierarchical_context_loss
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of, total
from hintjax.networks import Features

MOST_CHANNELS = 512  # largest number of channels of the fusion, as published


def review(
    pairs: Pairs,
    *,
    loss: Callable[[Array, Array], Float[Array, " batch"]] = hierarchical_context_loss,
) -> Method:
    """ReviewKD: each stage of the student, joined by the deeper ones, predicts a hint.

    Each stage, from the deepest to the shallowest, has an attention-based fusion
    (`hintjax.regressors.ABF`). It reduces the channels of the guided map, mixes the map
    with the fusion of the deeper stages, and predicts the hint map. The hierarchical
    context loss compares predictions and hints, and is summed over stages. All sizes
    come from the features: the fusion has as many channels as the deepest guided layer,
    at most 512.

    The usual setting pairs the three stages of a residual network and the pooled
    features (vectors are maps of 1 x 1). The student's features are taken after the
    ReLU, the teacher's before it. The weight is 5 (WRN, ResNet x4), 0.6 (ResNet-56 to
    20) or 1 (ResNet-110 to 32), and grows over 20 epochs: see `warm_up`.

    Args:
        pairs: (guided layer, hint layer) for each stage, shallow to deep, as paths.
        loss: compares a prediction with its hint, one value per example.

    Returns:
        The method. It trains one ABF per pair, named `guided->hint`; remembers their
        BatchNorm statistics; reports the `loss` of each pair if there are several. The
        running variance differs from torch's: see
        `hintjax.regressors.modules.batch_norm`.

    Raises:
        ValueError: if there are no pairs, if a pair is given twice, or (when a stage is
            initialized) if a layer is neither a map nor a vector.

    References:
        Chen et al. 2021, Distilling Knowledge via Knowledge Review.
    """
    function("review", loss=loss)
    student_wants, teacher_wants = hints_of("review", pairs)
    names = [f"{guided}->{hint}" for guided, hint in pairs]
    if len(set(names)) < len(names):
        raise Refusal(message("review", "each pair once", f"{names}"))

    def stages(
        student: Features, teacher: Features
    ) -> Iterator[tuple[str, regressors.ABF, Array, Array]]:
        """Name, ABF, guided map and hint map of each stage, deep to shallow."""
        maps = [
            (_map(student.hints[guided], guided), _map(teacher.hints[hint], hint))
            for guided, hint in pairs
        ]
        mid = min(MOST_CHANNELS, maps[-1][0].shape[-1])
        for name, (guided, hint) in reversed(list(zip(names, maps, strict=True))):
            module = regressors.ABF(mid, hint.shape[-1], (hint.shape[1], hint.shape[2]))
            yield name, module, guided, hint

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        def made(student: Features, teacher: Features) -> tuple[dict, dict]:
            params, memory, deeper = {}, {}, None
            for number, (name, module, guided, _) in enumerate(
                stages(student, teacher)
            ):
                one = jax.random.fold_in(key, number)
                (_, deeper), variables = module.init_with_output(one, guided, deeper)
                memory[name] = {"batch_stats": variables["batch_stats"]}
                params[name] = variables["params"]
            return params, memory

        # Only shapes and random keys matter. XLA removes the rest as dead code.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (student, teacher))
        return made(*zeros)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        parts, remembered, losses, deeper = [], {}, {}, None
        for name, module, guided, hint in stages(student, teacher):
            (predicted, deeper), changed = module.apply(
                {"params": params[name], **memory[name]},
                guided,
                deeper,
                context.train,
                mutable=["batch_stats"] if context.train else [],
            )
            remembered[name] = {**memory[name], **changed}
            values = loss(predicted, hint)
            parts.append(values)
            losses[f"{name}/loss"] = masked_mean(values, batch.get("where"))
        return total(parts), remembered, losses if len(names) > 1 else {}

    return Method(student_wants, teacher_wants, init, apply)


def warm_up(
    weight: float, epochs: int, steps_per_epoch: int
) -> Callable[[Array], Float[Array, ""]]:
    """A weight that grows over the first epochs, as a schedule of the step.

    weight(e) = weight min(1, e / epochs), with the epoch e from 0

    The weight is constant within an epoch, as published; it is 0 in the first epoch.
    (`optax.linear_schedule(0.0, weight, epochs * steps_per_epoch)` is the smooth form.)

    Args:
        weight: the weight after the warm-up.
        epochs: length of the warm-up; 20 in ReviewKD and DKD.
        steps_per_epoch: number of optimizer steps in an epoch.

    Returns:
        `step -> weight`.

    Raises:
        ValueError: if `epochs` or `steps_per_epoch` is not an integer >= 1, or if the
            weight is negative.

    >>> grown = warm_up(5.0, epochs=2, steps_per_epoch=10)
    >>> [float(grown(step)) for step in (0, 9, 10, 20, 30)]
    [0.0, 0.0, 2.5, 5.0, 5.0]

    References:
        Chen et al. 2021, code (`kd_warm_up`).
    """
    not_negative("warm_up", weight=weight)
    positive_int("warm_up", epochs=epochs, steps_per_epoch=steps_per_epoch)

    def schedule(step: ArrayLike) -> Array:
        epoch = (jnp.asarray(step) // steps_per_epoch).astype(jnp.float32)
        return weight * jnp.minimum(1.0, epoch / epochs)

    return schedule


def _map(x: Array, path: str) -> Array:
    """Returns a vector as a map of one position, and a map unchanged."""
    if len(x.shape) == 4:
        return x
    if len(x.shape) != 2:
        wanted = f"{path} to be a map (h, w, c) or a vector (c)"
        do = "View tokens as a map with hintjax.viewed and regressors.to_grid."
        raise Refusal(message("review", wanted, f"{tuple(x.shape[1:])}", do))
    return x.reshape(x.shape[0], 1, 1, x.shape[1])
