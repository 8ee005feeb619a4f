"""Methods that compare features directly and train nothing beside the student."""

from collections.abc import Callable

from jaxtyping import Array, Float

from hintjax._checks import Refusal, message
from hintjax.method import Method, Pairs, hints_of, nothing
from hintjax.methods._shapes import Fit, check_pair, checked, examples_of, vectors
from hintjax.methods._tokens import counted
from hintjax.networks import Wants


def compared(
    caller: str,
    pairs: Pairs,
    loss: Callable[..., Float[Array, " batch"]],
    padding: str | None = None,
    fit: Fit = vectors,
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

    Returns:
        The method.
    """
    student_wants, teacher_wants = hints_of(caller, pairs)

    def apply(params, memory, student, teacher, batch, context):
        where = counted(caller, batch, padding)
        values = [
            loss(student.hints[guided], teacher.hints[hint], where=where)
            for guided, hint in pairs
        ]
        return sum(values), memory, {}

    method = Method(student_wants, teacher_wants, nothing, apply)
    return checked(caller, pairs, method, fit)


def outputs(
    caller: str,
    loss: Callable[..., Float[Array, " batch"]],
    padding: str | None = None,
    *,
    coupled: bool = False,
) -> Method:
    """A loss of the two outputs, (batch, *positions, classes), as a method.

    When a stage is initialized, the method raises if the outputs of the two networks
    have different shapes.

    Args:
        caller: the name of the method, for messages.
        loss: `(student, teacher, batch, where=mask) -> one value per example`.
        padding: the name of the mask of positions in the batch. With it, the mask that
            the loss receives marks the valid positions.
        coupled: whether the loss compares the examples of a batch, so that it needs the
            mask of the valid examples even without `padding`.

    Returns:
        The method.
    """

    def check(student, teacher, examples=None):
        layers = {"the output": student.output}, {"the output": teacher.output}
        check_pair(caller, *layers, examples, vectors)

    def init(key, student, teacher, data):
        check(student, teacher)
        if student.output.shape != teacher.output.shape:
            wanted = "student and teacher to have the same number of classes"
            got = f"outputs {student.output.shape} and {teacher.output.shape}"
            do = "Distill hints instead, or change the head of a network."
            raise Refusal(message(caller, wanted, got, do))
        return nothing(key, student, teacher, data)

    def apply(params, memory, student, teacher, batch, context):
        check(student, teacher, examples_of(batch))
        where = None
        if coupled or padding is not None:
            where = counted(caller, batch, padding)
        return loss(student.output, teacher.output, batch, where=where), memory, {}

    return Method(Wants(output=True), Wants(output=True), init, apply)
