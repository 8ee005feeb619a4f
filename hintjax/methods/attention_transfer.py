"""AT: attention transfer (Zagoruyko and Komodakis 2017)."""

from collections.abc import Callable
from functools import partial

from jaxtyping import Array, Float

from hintjax._checks import function, positive_int
from hintjax.losses import attention_map, attention_map_loss, attention_maps
from hintjax.method import Method, Pairs, hints_of, nothing, over_pairs
from hintjax.methods._shapes import checked, maps
from hintjax.methods._tokens import counted


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

    def apply(params, memory, student, teacher, batch, context):
        layers = [
            (student.hints[guided], teacher.hints[hint]) for guided, hint in pairs
        ]
        if padding is None:
            summed, made = over_pairs(loss), [make(*pair) for pair in layers]
        else:
            where = counted(caller, batch, padding)
            flat = where.reshape(len(where), -1)
            summed = over_pairs(partial(loss, where=flat))
            made = [make(*pair, where=where) for pair in layers]
        return summed(*zip(*made, strict=True)), memory, {}

    method = Method(student_wants, teacher_wants, nothing, apply)
    return checked(caller, pairs, method, maps)
