"""PKD: patient knowledge distillation (Sun et al. 2019)."""

from jaxtyping import Array

from hintjax._checks import Refusal, instance, message, rank
from hintjax.losses import patient_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import directions


def patient(pairs: Pairs, *, token: int = 0) -> Method:
    """PKD: the class token points where the teacher's does (see `patient_loss`).

    It trains nothing beside the student, and both networks must have the same width.
    The authors' code pairs all layers of the student except the last, which kd teaches:
    layers 1 to 5 of a student with 6 layers are paired with layers 2, 4, 6, 8 and 10 of
    a teacher with 12 (PKD-Skip). Its example run gives the mean over the pairs a weight
    of 500. For the sum here this is a weight of 500 / len(pairs).

    Args:
        pairs: (guided layer, hint layer) of hidden states (batch, n, c), as paths. The
            losses of the pairs are summed.
        token: the index of the class token; -1 is the last token.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, or if a layer has no such token.

    References:
        Sun et al. 2019, Patient Knowledge Distillation for BERT Model Compression.
    """
    instance("patient", int, token=token)

    def loss(student: Array, teacher: Array, where: Array | None) -> Array:
        rank("patient", 3, "batch n c", student=student, teacher=teacher)
        for x in (student, teacher):
            # JAX silently clamps an index that is out of range.
            if not -x.shape[1] <= token < x.shape[1]:
                got = f"{x.shape[1]} tokens"
                raise Refusal(message("patient", f"a token at {token}", got))
        return patient_loss(student[:, token], teacher[:, token], where=where)

    return compared("patient", pairs, loss, first=directions)
