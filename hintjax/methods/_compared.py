"""Methods that compare features directly and train nothing beside the student."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from hintjax._checks import Refusal, message
from hintjax.method import (
    Applied,
    Batch,
    Context,
    Data,
    Method,
    Pairs,
    hints_of,
    nothing,
    output_of,
    total,
)
from hintjax.methods._shapes import Fit, check_pair, checked, examples_of, vectors
from hintjax.methods._tokens import counted
from hintjax.networks import Features, Wants


def compared(
    caller: str,
    pairs: Pairs,
    loss: Callable[..., Float[Array, " batch"]],
    padding: str | None = None,
    fit: Fit = vectors,
    first: Fit | None = None,
) -> Method:
    """The loss of each pair of layers, summed.

    Args:
        caller: the name of the method, for messages.
        pairs: (guided layer, hint layer) for each pair.
        loss: `(student, teacher, where=mask) -> one value per example`. The mask marks
            the valid examples, because a loss that compares the examples of a batch
            must leave out the examples that only fill the batch.
        padding: the name of the mask of positions in the batch. With it, the mask that
            the loss receives marks the valid positions.
        fit: the shapes of a pair that the loss can work with.
        first: the shapes of the first batch below which the loss is constant.

    Returns:
        The method.
    """
    student_wants, teacher_wants = hints_of(caller, pairs)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        where = counted(caller, batch, padding)
        values = [
            loss(student.hints[guided], teacher.hints[hint], where=where)
            for guided, hint in pairs
        ]
        return total(values), memory, {}

    method = Method(student_wants, teacher_wants, nothing, apply)
    return checked(caller, pairs, method, fit, first)


def outputs(
    caller: str,
    loss: Callable[..., Float[Array, " batch"]],
    padding: str | None = None,
    *,
    coupled: bool = False,
    least: int = 2,
) -> Method:
    """A loss of the two outputs, (batch, *positions, classes), as a method.

    When a stage is initialized, the method raises if the outputs of the two networks
    have different shapes, or fewer classes than the loss needs.

    Args:
        caller: the name of the method, for messages.
        loss: `(student, teacher, batch, where=mask) -> one value per example`.
        padding: the name of the mask of positions in the batch. With it, the mask that
            the loss receives marks the valid positions.
        coupled: whether the loss compares the examples of a batch, so that it needs the
            mask of the valid examples even without `padding`.
        least: the number of classes below which the loss is constant. The softmax of
            one class is 1, whatever the network learns.

    Returns:
        The method.
    """

    def both(
        student: Features, teacher: Features, examples: int | None = None
    ) -> tuple[Any, Any]:
        ours = output_of(caller, "student", student)
        theirs = output_of(caller, "teacher", teacher)
        layers = {"the output": ours}, {"the output": theirs}
        check_pair(caller, *layers, examples, vectors)
        return ours, theirs

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        ours, theirs = both(student, teacher)
        if ours.shape != theirs.shape:
            wanted = "student and teacher to have the same number of classes"
            got = f"outputs {ours.shape} and {theirs.shape}"
            do = "Distill hints instead, or change the head of a network."
            raise Refusal(message(caller, wanted, got, do))
        if ours.shape[-1] < least:
            wanted = f"outputs of {least} classes or more"
            do = "With fewer the loss is constant: compare hints, or write a loss."
            raise Refusal(message(caller, wanted, f"{ours.shape}", do))
        return nothing(key, student, teacher, data)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        ours, theirs = both(student, teacher, examples_of(batch))
        where = None
        if coupled or padding is not None:
            where = counted(caller, batch, padding)
        return loss(ours, theirs, batch, where=where), memory, {}

    return Method(Wants(output=True), Wants(output=True), init, apply)
