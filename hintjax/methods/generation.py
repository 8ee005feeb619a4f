"""MGD: masked generative distillation (Yang et al. 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from hintjax import _checks, regressors
from hintjax._checks import Refusal, function, message
from hintjax.losses import masked_generation_loss
from hintjax.method import Method, Pairs, hints_of
from hintjax.methods import _regressed


def masked_channels(
    key: Key[Array, ""], shape: tuple[int, int, int], rate: float
) -> Bool[Array, "1 1 c"]:
    """MGD's mask for classification: whole channels are hidden, each at the rate."""
    _check("masked_channels", key, shape, rate)
    return jax.random.uniform(key, (1, 1, shape[-1])) >= rate


def masked_positions(
    key: Key[Array, ""], shape: tuple[int, int, int], rate: float
) -> Bool[Array, "h w 1"]:
    """MGD's mask for detection and segmentation: positions are hidden at the rate."""
    _check("masked_positions", key, shape, rate)
    return jax.random.uniform(key, (*shape[:-1], 1)) >= rate


def masked_generation(
    pairs: Pairs,
    *,
    rate: float = 0.15,
    mask: Callable[..., Bool[Array, "..."]] = masked_channels,
) -> Method:
    """MGD: from a part of the student's features, the teacher's are generated whole.

    Where sizes differ, the larger map is averaged down first. The student's map is
    aligned to the teacher's channels, masked at random, and sent through two
    convolutions (`hintjax.regressors.Generator`). The field pairs the last stages, at
    weight 7e-5 for classification; for detection and segmentation positions are masked
    (`mask=masked_positions`).

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c).
        rate: the share that is hidden, in [0, 1).
        mask: draws what is kept of one example's map, `(key, shape, rate)`.

    Returns:
        The method. It trains one generator per pair, named `guided->hint`. Masks are
        drawn for each example from its "index" in the batch, where there is one, so
        that they do not depend on its place.

    Raises:
        ValueError: without pairs, for a rate outside its range, or (when a stage is
            initialized) for a layer that is not a map.

    References:
        Yang et al. 2022, Masked Generative Distillation.
    """
    _check_rate("masked_generation", rate)
    function("masked_generation", mask=mask)
    student_wants, teacher_wants = hints_of("masked_generation", pairs)

    def sizing(student, teacher):
        if not len(student) == len(teacher) == 3:
            got = f"student {student} and teacher {teacher}"
            raise Refusal(message("masked_generation", "maps (h, w, c)", got))
        return regressors.Generator(teacher[-1])

    init, _ = _regressed.beside(pairs, sizing)

    def apply(params, memory, student, teacher, batch, context):
        total = 0.0
        ready = _regressed.ready(pairs, sizing, student, teacher)
        for number, (name, module, guided, hint) in enumerate(ready):
            key = jax.random.fold_in(context.key, number)
            index = batch.get("index", jnp.arange(len(guided)))
            kept = jax.vmap(
                lambda i, key=key, shape=hint.shape[1:]: mask(
                    jax.random.fold_in(key, i), shape, rate
                )
            )(index)
            generated = module.apply({"params": params[name]}, guided, mask=kept)
            total = total + masked_generation_loss(generated, hint)
        return total, memory, {}

    return Method(student_wants, teacher_wants, init, apply)


def _check(caller, key, shape, rate):
    _check_rate(caller, rate)
    _checks.sizes(caller, 3, shape=shape)
    _checks.key(caller, 0, key=key)


def _check_rate(caller, rate):
    _checks.scalar(caller, "in [0, 1)", lambda rate: 0 <= rate < 1, **{"a rate": rate})
