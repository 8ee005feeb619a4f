"""MGD: masked generative distillation (Yang et al. 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, ScalarLike

from hintjax import _checks, regressors
from hintjax._checks import Refusal, function, message
from hintjax.losses import masked_generation_loss
from hintjax.method import Applied, Batch, Context, Method, Pairs, hints_of, total
from hintjax.methods import _regressed
from hintjax.networks import Features


def masked_channels(
    key: Key[Array, ""], shape: tuple[int, int, int], rate: float
) -> Bool[Array, "1 1 c"]:
    """MGD's mask for classification: each channel is hidden with probability `rate`."""
    _check("masked_channels", key, shape, rate)
    return jax.random.uniform(key, (1, 1, shape[-1])) >= rate


def masked_positions(
    key: Key[Array, ""], shape: tuple[int, int, int], rate: float
) -> Bool[Array, "h w 1"]:
    """MGD's mask for dense tasks: each position is hidden with probability `rate`.

    Dense tasks are detection and segmentation.
    """
    _check("masked_positions", key, shape, rate)
    return jax.random.uniform(key, (*shape[:-1], 1)) >= rate


def masked_generation(
    pairs: Pairs,
    *,
    rate: float = 0.15,
    mask: Callable[..., Bool[Array, "..."]] = masked_channels,
) -> Method:
    """MGD: from a part of the student's features, the teacher's are generated whole.

    If sizes differ, the larger map is first averaged to the smaller size. The student's
    map is aligned to the teacher's channels, masked at random, and passed through two
    convolutions (`hintjax.regressors.Generator`). The usual setting for classification
    pairs the last stages at weight 7e-5. For detection and segmentation, positions are
    masked (`mask=masked_positions`).

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c).
        rate: the fraction of the map that is hidden, in [0, 1).
        mask: `(key, shape, rate) -> mask` draws the mask of one example's map, True
            where the map is kept.

    Returns:
        The method. It trains one generator per pair, named `guided->hint`. The
        mask of an example is drawn from its "index", if the batch has one, so that it
        does not depend on the example's place in the batch.

    Raises:
        ValueError: if there are no pairs, if the rate is outside its range, or (when a
            stage is initialized) if a layer is not a map.

    References:
        Yang et al. 2022, Masked Generative Distillation.
    """
    _check_rate("masked_generation", rate)
    function("masked_generation", mask=mask)
    student_wants, teacher_wants = hints_of("masked_generation", pairs)

    def sizing(
        student: regressors.Shape, teacher: regressors.Shape
    ) -> regressors.Generator:
        if not len(student) == len(teacher) == 3:
            got = f"student {student} and teacher {teacher}"
            raise Refusal(message("masked_generation", "maps (h, w, c)", got))
        return regressors.Generator(teacher[-1])

    init, _ = _regressed.beside(pairs, sizing)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        values = []
        ready = _regressed.ready(pairs, sizing, student, teacher)
        for number, (name, module, guided, hint) in enumerate(ready):
            key = jax.random.fold_in(context.key, number)
            index = batch.get("index", jnp.arange(len(guided)))
            kept = jax.vmap(
                lambda i, key=key, shape=hint.shape[1:]: mask(
                    jax.random.fold_in(key, i), shape, rate
                )
            )(index)
            generated, _ = module.apply(
                {"params": params[name]}, guided, mask=kept, mutable=[]
            )
            values.append(masked_generation_loss(generated, hint))
        return total(values), memory, {}

    return Method(student_wants, teacher_wants, init, apply)


def _check(caller: str, key: Array, shape: tuple[int, ...], rate: ScalarLike) -> None:
    """Raise unless the arguments of a mask are a key, a map's shape and a rate."""
    _check_rate(caller, rate)
    _checks.sizes(caller, 3, shape=shape)
    _checks.key(caller, 0, key=key)


def _check_rate(caller: str, rate: ScalarLike) -> None:
    """Raise unless the rate is in [0, 1)."""
    _checks.scalar(caller, "in [0, 1)", lambda rate: 0 <= rate < 1, **{"a rate": rate})
