"""FT: factor transfer (Kim et al. 2018)."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax import regressors
from hintjax._checks import Refusal, function, message, scalar
from hintjax._numerics import as_float
from hintjax.losses import factor_loss
from hintjax.method import (
    PREPARED,
    Applied,
    Batch,
    Context,
    Data,
    Method,
    Pairs,
    hints_of,
    total,
)
from hintjax.networks import Features


def factor_transfer(
    pairs: Pairs,
    *,
    rate: float = 0.5,
    loss: Callable[[Array, Array], Float[Array, " batch"]] = factor_loss,
) -> Method:
    """FT: a translator of the guided layer imitates a paraphraser of the hint.

    Training has two stages. First the paraphraser, an autoencoder of the hint layer, is
    trained on the teacher alone (30 epochs in the CRD benchmark). Then its encoder is
    frozen, and the student and its translator learn to match the encoder's output, the
    factor::

        ft = weighted(factor_transfer(pairs), 200)
        both = objective(task=..., ft=ft)
        first = hint_stage(student, teacher, both.prepare, ...)
        second = distillation_stage(student, teacher, both, ...)
        second.init(..., carry=state)  # the last state of the first stage

    The usual setting pairs the last stages of two residual networks at weight 200.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c).
        rate: the channels of the factor, as a fraction of the hint's channels, in
            (0, 1].
        loss: compares two batches of factors, one value per example.

    Returns:
        The method. It trains one translator per pair (three 3x3 convolutions with
        BatchNorm), named `guided->hint`, and remembers their statistics
        (`translators`) and the paraphrasers (`prepared`), which no optimizer changes.

    Raises:
        ValueError: if there are no pairs, if the rate is outside its range, or (when a
            stage is initialized) if a layer is not a map.

    References:
        Kim, Park, Kwak 2018, Paraphrasing Complex Network: Network Compression via
        Factor Transfer.
    """
    function("factor_transfer", loss=loss)
    before = paraphrase(pairs, rate=rate)
    student_wants, teacher_wants = hints_of("factor_transfer", pairs)

    def translators(
        student: Features, teacher: Features
    ) -> Iterator[tuple[_Pair, regressors.Coder]]:
        for own in _ready(pairs, rate, student, teacher):
            channels = (own.guided.shape[-1], own.factor, own.factor)
            yield own, regressors.Coder(channels, batch_norm=True)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params, statistics = {}, {}
        first, second = jax.random.split(key)
        for number, (own, module) in enumerate(translators(student, teacher)):
            one = jax.random.fold_in(first, number)
            params[own.name], statistics[own.name] = regressors.init(
                module, one, own.guided.shape
            )
        prepared, _ = before.init(second, student, teacher, data)
        return params, {PREPARED: prepared, "translators": statistics}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        values, statistics = [], {}
        for own, module in translators(student, teacher):
            paraphraser = memory[PREPARED][own.name]
            coded, _ = regressors.apply(
                own.encoder, paraphraser["encoder"], {}, own.hint, False
            )
            translated, statistics[own.name] = regressors.apply(
                module,
                params[own.name],
                memory["translators"][own.name],
                own.guided,
                context.train,
            )
            values.append(loss(translated, coded))
        return total(values), {**memory, "translators": statistics}, {}

    return Method(student_wants, teacher_wants, init, apply, prepare=before)


def paraphrase(pairs: Pairs, *, rate: float = 0.5) -> Method:
    """FT's first stage: an autoencoder of each hint layer, on the teacher alone.

    values = sum over pairs of mean_i (decoder(encoder(t))_i - t_i)^2

    This method is `factor_transfer(pairs).prepare`. It reads only the shapes of the
    student, which does not change in a hint stage with this method.

    Args:
        pairs: as for `factor_transfer`.
        rate: as for `factor_transfer`.

    Returns:
        The method. It trains one paraphraser per pair (`encoder` and `decoder`), named
        `guided->hint`.

    Raises:
        ValueError: see `factor_transfer`.

    References:
        Kim, Park, Kwak 2018.
    """
    share = {"a rate": rate}
    scalar("factor_transfer", "in (0, 1]", lambda r: 0 < r <= 1, **share)
    student_wants, teacher_wants = hints_of("factor_transfer", pairs)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params = {}
        for number, own in enumerate(_ready(pairs, rate, student, teacher)):
            one, two = jax.random.split(jax.random.fold_in(key, number))
            factor = (*own.hint.shape[:-1], own.factor)
            params[own.name] = {
                "encoder": regressors.init(own.encoder, one, own.hint.shape)[0],
                "decoder": regressors.init(own.decoder, two, factor)[0],
            }
        return params, {}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        values = []
        for own in _ready(pairs, rate, student, teacher):
            weights = params[own.name]
            coded, _ = regressors.apply(
                own.encoder, weights["encoder"], {}, own.hint, context.train
            )
            again, _ = regressors.apply(
                own.decoder, weights["decoder"], {}, coded, context.train
            )
            again, hint = as_float("factor_transfer", again, own.hint)
            values.append(jnp.mean(jnp.square(again - hint), (1, 2, 3)))
        return total(values), memory, {}

    return Method(student_wants, teacher_wants, init, apply)


class _Pair(NamedTuple):
    """One pair of layers, and the two halves of its paraphraser."""

    name: str  # guided->hint
    guided: Any
    hint: Any
    factor: int  # number of channels
    encoder: regressors.Coder
    decoder: regressors.Coder


def _ready(
    pairs: Pairs, rate: float, student: Features, teacher: Features
) -> Iterator[_Pair]:
    """Yields each pair of maps with its paraphraser; accepts shapes too."""
    for guided, hint in pairs:
        ours, theirs = student.hints[guided], teacher.hints[hint]
        if not len(ours.shape) == len(theirs.shape) == 4:
            wanted = f"{guided} and {hint} to be maps (h, w, c)"
            got = f"{tuple(ours.shape[1:])} and {tuple(theirs.shape[1:])}"
            raise Refusal(message("factor_transfer", wanted, got))
        c = theirs.shape[-1]
        factor = max(1, int(c * rate))
        encoder = regressors.Coder((c, factor, factor))
        decoder = regressors.Coder((factor, c, c))
        yield _Pair(f"{guided}->{hint}", ours, theirs, factor, encoder, decoder)
