"""AT: attention transfer (Zagoruyko and Komodakis 2017)."""

from collections.abc import Callable

from jaxtyping import Array, Float

from hintjax._checks import positive_int
from hintjax.losses import attention_energy, attention_map_loss, attention_maps
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
from hintjax.networks import Features


def attention_transfer(
    pairs: Pairs,
    *,
    power: int = 2,
    loss: Callable[[Array, Array], Float[Array, " batch"]] = attention_map_loss,
) -> Method:
    """AT: the student's attention maps match the teacher's.

    The method first computes the maps of each pair. Maps of one size are then compared
    at once, by vmap over the pairs, and the losses are summed. Nothing is trained
    beside the student, and the numbers of channels may differ. The usual setting pairs
    all groups of a residual network at weight 1000, with the loss of the official code
    (the default). For an even power the default is exactly that loss; for an odd power
    see `attention_transfer_loss`. The paper's form is `loss=attention_map_loss_paper`
    at weight beta / 2.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths.
        power: the exponent p of the attention map.
        loss: compares two batches of maps, one value per example.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, or if the power is not an integer >= 1.

    References:
        Zagoruyko and Komodakis 2017, Paying More Attention to Attention.
    """
    positive_int("attention_transfer", power=power)
    summed = over_pairs(loss)
    student_wants, teacher_wants = hints_of("attention_transfer", pairs)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        maps = [
            attention_maps(student.hints[guided], teacher.hints[hint], power=power)
            for guided, hint in pairs
        ]
        return summed(*zip(*maps, strict=True)), memory, {}

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

    return Method(student_wants, teacher_wants, nothing, apply, reduced=reduced)
