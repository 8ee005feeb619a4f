"""What methods share that compare what they see as it is and train nothing."""

from collections.abc import Callable

from jaxtyping import Array, Float

from hintjax._checks import Refusal, message
from hintjax.method import Method, Pairs, hints_of, nothing
from hintjax.methods._tokens import counted
from hintjax.networks import Wants


def compared(
    caller: str,
    pairs: Pairs,
    loss: Callable[..., Float[Array, " batch"]],
    padding: str | None = None,
) -> Method:
    """The loss of each pair of layers, summed.

    The loss is told which examples are valid: one that compares the examples of a batch
    must not see those that only fill it up. With `padding`, the name of the batch's mask
    of tokens, it is told which tokens are.
    """
    student_wants, teacher_wants = hints_of(caller, pairs)

    def apply(params, memory, student, teacher, batch, context):
        where = counted(caller, batch, padding)
        values = [
            loss(student.hints[guided], teacher.hints[hint], where=where)
            for guided, hint in pairs
        ]
        return sum(values), memory, {}

    return Method(student_wants, teacher_wants, nothing, apply)


def outputs(caller: str, loss: Callable[..., Float[Array, " batch"]]) -> Method:
    """A loss of the two outputs, `(student, teacher, batch) -> one value per example`.

    Networks of other classes are refused when a stage is initialized.
    """

    def init(key, student, teacher, data):
        if student.output.shape != teacher.output.shape:
            wanted = "student and teacher to have the same classes"
            got = f"outputs {student.output.shape} and {teacher.output.shape}"
            do = "Distill hints instead, or give both networks one head."
            raise Refusal(message(caller, wanted, got, do))
        return nothing(key, student, teacher, data)

    def apply(params, memory, student, teacher, batch, context):
        return loss(student.output, teacher.output, batch), memory, {}

    return Method(Wants(output=True), Wants(output=True), init, apply)
