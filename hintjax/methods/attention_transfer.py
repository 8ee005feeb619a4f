"""AT: attention transfer (Zagoruyko and Komodakis 2017)."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Array, Float

from hintjax._checks import function, positive_int
from hintjax.losses import (
    attention_energy,
    attention_map,
    attention_map_loss,
    attention_maps,
)
from hintjax.method import (
    Applied,
    Batch,
    Context,
    Method,
    Pairs,
    Reduced,
    hints_of,
    nothing,
    over_pairs,
)
from hintjax.methods._shapes import checked, maps, places
from hintjax.methods._tokens import masked
from hintjax.networks import Features


def attention_transfer(
    pairs: Pairs,
    *,
    power: int = 2,
    attention: Callable[..., Float[Array, "..."]] = attention_map,
    loss: Callable[..., Float[Array, " batch"]] = attention_map_loss,
    padding: str | None = None,
) -> Method:
    """AT: the student's attention maps match the teacher's.

    The method first computes the maps of each pair. Maps of one size are then compared
    at once, by vmap over the pairs, and the losses are summed. Nothing is trained
    beside the student, and the numbers of channels may differ. The usual setting pairs
    all groups of a residual network at weight 1000, with the loss of the official code
    (the default). For an even power the default is exactly that loss; for the code's
    odd powers, pass `attention=attention_map_code`. The paper's form is
    `loss=attention_map_loss_paper` at weight beta / 2.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c),
            tokens (n, c) or volumes (d, h, w, c).
        power: the exponent p of the attention map.
        attention: makes the attention map of a layer: `attention_map`, or
            `attention_map_code`, whose odd powers keep signs.
        loss: compares two batches of maps, one value per example. With `padding`, it
            also receives the mask of valid positions, as `where`.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel, at the smaller size of each
            pair. By default all positions are valid.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, if the power is not an integer >= 1, if a
            layer has no positions, or if the batch has no such mask.

    References:
        Zagoruyko and Komodakis 2017, Paying More Attention to Attention.
    """
    caller = "attention_transfer"
    positive_int(caller, power=power)
    function(caller, attention=attention, loss=loss)
    make = partial(attention_maps, power=power, attention=attention)
    student_wants, teacher_wants = hints_of(caller, pairs)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        layers = [
            (student.hints[guided], teacher.hints[hint]) for guided, hint in pairs
        ]
        if padding is None:
            summed, made = over_pairs(loss), [make(*pair) for pair in layers]
        else:
            where = masked(caller, batch, padding)
            flat = where.reshape(len(where), -1)
            summed = over_pairs(partial(loss, where=flat))
            made = [make(*pair, where=where) for pair in layers]
        return summed(*zip(*made, strict=True)), memory, {}

    def reduced(student: Features) -> Reduced:
        # A layer may be paired with layers of several sizes: each needs an energy.
        sizes = [student.hints[guided].shape[1:-1] for guided, _ in pairs]
        names = [
            f"attention({hint}, {power}, {size})"
            for (_, hint), size in zip(pairs, sizes, strict=True)
        ]

        def reduce(teacher: Features) -> Features:
            hints = {
                name: attention_energy(teacher.hints[hint], size, power=power)
                for name, (_, hint), size in zip(names, pairs, sizes, strict=True)
            }
            return Features(teacher.output, hints, teacher.params)

        renamed = [
            (guided, name) for (guided, _), name in zip(pairs, names, strict=True)
        ]
        return Reduced(reduce, attention_transfer(renamed, power=power, loss=loss))

    # The reduction is that of the default map, and a mask has the size of the map.
    plain = attention is attention_map and padding is None
    method = Method(
        student_wants,
        teacher_wants,
        nothing,
        apply,
        reduced=reduced if plain else None,
    )
    return checked(caller, pairs, method, maps, places)
