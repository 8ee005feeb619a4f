"""What methods share that compare layers as they are and train nothing."""

from collections.abc import Callable

from jaxtyping import Array, Float

from hintjax.method import Method, Pairs, hints_of, nothing


def compared(
    caller: str, pairs: Pairs, loss: Callable[..., Float[Array, " batch"]]
) -> Method:
    """The loss of each pair of layers, summed.

    The loss is told which examples are valid: one that compares the examples of a batch
    must not see those that only fill it up.
    """
    student_wants, teacher_wants = hints_of(caller, pairs)

    def apply(params, memory, student, teacher, batch, context):
        values = [
            loss(student.hints[guided], teacher.hints[hint], where=batch.get("where"))
            for guided, hint in pairs
        ]
        return sum(values), memory, {}

    return Method(student_wants, teacher_wants, nothing, apply)
