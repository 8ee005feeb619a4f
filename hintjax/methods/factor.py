"""FT: factor transfer (Kim et al. 2018)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax import regressors
from hintjax._checks import message
from hintjax._numerics import as_float
from hintjax.losses import factor_loss
from hintjax.method import Method, Pairs, hints_of


def factor_transfer(
    pairs: Pairs,
    *,
    rate: float = 0.5,
    loss: Callable[[Array, Array], Float[Array, " batch"]] = factor_loss,
) -> Method:
    """FT: a translator makes of the guided layer what a paraphraser makes of the hint.

    In two stages: first the paraphraser, an autoencoder of the hint layer, is trained
    on the teacher alone (`paraphrase`, 30 epochs in the CRD benchmark), then its
    encoder stays as it is while the student and its translator learn to match its
    factor::

        first = hint_stage(student, teacher, objective(ft=paraphrase(pairs)), ...)
        ft = weighted(factor_transfer(pairs), 200)
        second = distillation_stage(student, teacher, objective(task=..., ft=ft), ...)
        second.init(..., carry=state)  # the last state of the first stage

    The field pairs the last stages of two residual networks at weight 200.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c).
        rate: channels of the factor, as a share of the hint's, in (0, 1].
        loss: compares two batches of factors, one value per example.

    Returns:
        The method. For each pair it trains, under `guided->hint`, a `translator` (three
        3x3 convolutions with BatchNorm), whose statistics it remembers, and holds the
        `paraphraser` (`encoder` and `decoder`), which has no gradient. An optimiser's
        weight decay still shrinks it: mask it out.

    Raises:
        ValueError: without pairs, for a rate outside its range, or (when a stage is
            initialised) for a layer that is not a map.

    References:
        Kim, Park, Kwak 2018, Paraphrasing Complex Network: Network Compression via
        Factor Transfer.
    """
    return _factor("factor_transfer", pairs, rate, loss)


def paraphrase(pairs: Pairs, *, rate: float = 0.5) -> Method:
    """FT's first stage: an autoencoder of each hint layer, on the teacher alone.

    values = sum over pairs of mean_i (decoder(encoder(t))_i - t_i)^2

    Its parameters are those of `factor_transfer` with the same pairs and rate, so that
    a stage of that, whose term has the same name, carries them on (`carry=`). The
    student is seen only for its shapes, and does not change in a hint stage of this.

    Args:
        pairs: as for `factor_transfer`.
        rate: as for `factor_transfer`.

    Returns:
        The method.

    Raises:
        ValueError: see `factor_transfer`.

    References:
        Kim, Park, Kwak 2018.
    """
    return _factor("paraphrase", pairs, rate, None)


def _factor(caller, pairs, rate, loss):
    """Both methods: the first stage where there is no loss of factors."""
    if not 0 < rate <= 1:
        raise ValueError(message(caller, "a rate in (0, 1]", f"{rate}"))
    student_wants, teacher_wants = hints_of(caller, pairs)

    def ready(student, teacher):
        for guided, hint in pairs:
            ours, theirs = student.hints[guided], teacher.hints[hint]
            if not len(ours.shape) == len(theirs.shape) == 4:
                wanted = f"{guided} and {hint} to be maps (h, w, c)"
                got = f"{tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])}"
                raise ValueError(message(caller, wanted, got))
            c, factor = theirs.shape[-1], max(1, int(theirs.shape[-1] * rate))
            modules = {
                "translator": regressors.Coder(
                    (ours.shape[-1], factor, factor), batch_norm=True
                ),
                "encoder": regressors.Coder((c, factor, factor)),
                "decoder": regressors.Coder((factor, c, c)),
            }
            yield f"{guided}->{hint}", modules, ours, theirs

    def init(key, student, teacher, data):
        params, memory = {}, {}
        for number, (name, modules, ours, theirs) in enumerate(ready(student, teacher)):
            factor = (*theirs.shape[:-1], modules["encoder"].channels[-1])
            shapes = (ours.shape, theirs.shape, factor)
            keys = jax.random.split(jax.random.fold_in(key, number), 3)
            made = {
                part: regressors.init(module, one, shape)
                for (part, module), one, shape in zip(
                    modules.items(), keys, shapes, strict=True
                )
            }
            paraphraser = {part: made[part][0] for part in ("encoder", "decoder")}
            params[name] = {"translator": made["translator"][0]}
            params[name]["paraphraser"] = paraphraser
            memory[name] = made["translator"][1]
        return params, memory

    def apply(params, memory, student, teacher, batch, context):
        total, remembered = 0.0, dict(memory)
        for name, modules, ours, theirs in ready(student, teacher):
            own = params[name]
            paraphraser = own["paraphraser"]
            if loss is None:
                coded, _ = regressors.apply(
                    modules["encoder"], paraphraser["encoder"], {}, theirs, True
                )
                again, _ = regressors.apply(
                    modules["decoder"], paraphraser["decoder"], {}, coded, True
                )
                again, theirs = as_float(caller, again, theirs)
                total = total + jnp.mean(jnp.square(again - theirs), (1, 2, 3))
                continue
            coded, _ = regressors.apply(
                modules["encoder"],
                jax.lax.stop_gradient(paraphraser["encoder"]),
                {},
                theirs,
                False,
            )
            translated, remembered[name] = regressors.apply(
                modules["translator"],
                own["translator"],
                memory[name],
                ours,
                context.train,
            )
            total = total + loss(translated, coded)
        return total, remembered, {}

    return Method(student_wants, teacher_wants, init, apply)
