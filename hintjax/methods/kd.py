"""KD: knowledge distillation (Hinton et al. 2015)."""

from hintjax._checks import message, positive
from hintjax.losses import kd_loss, soft_cross_entropy_loss
from hintjax.method import Method, nothing
from hintjax.networks import Wants


def kd(temperature: float = 4.0) -> Method:
    """KD: the student's softened output matches the teacher's (see `kd_loss`).

    Wants both outputs, trains nothing beside the student. The field's setting on
    CIFAR-100 is temperature 4, weight 0.9, with the task at weight 0.1.

    Args:
        temperature: of both softmaxes, > 0.

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, or (when a stage is
            initialised) if the networks differ in their number of classes.

    References:
        Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network.
    """
    return _outputs("kd", kd_loss, temperature)


def soft_targets(temperature: float = 3.0) -> Method:
    """KD as in FitNets' second stage: cross-entropy of the softened outputs.

    `H(P_T^tau, P_S^tau)`, without the factor tau^2 of `kd`. Its weight lambda decays
    from 4 to 1 (`lambda_decay`), beside the task at weight 1.

    Args:
        temperature: tau, > 0; the paper's is 3.

    Returns:
        The method; see `kd` for what it wants and raises.

    References:
        Romero et al. 2015, FitNets: Hints for Thin Deep Nets, Eq. 2.
    """
    return _outputs("soft_targets", soft_cross_entropy_loss, temperature)


def _outputs(name, loss, temperature):
    positive(name, temperature=temperature)

    def init(key, student, teacher, data):
        if student.output.shape != teacher.output.shape:
            wanted = "student and teacher to have the same classes"
            got = f"outputs {student.output.shape} and {teacher.output.shape}"
            do = "Distil hints instead, or give both networks one head."
            raise ValueError(message(name, wanted, got, do))
        return nothing(key, student, teacher, data)

    def apply(params, memory, student, teacher, batch, context):
        values = loss(student.output, teacher.output, temperature=temperature)
        return values, memory, {}

    return Method(Wants(output=True), Wants(output=True), init, apply)
