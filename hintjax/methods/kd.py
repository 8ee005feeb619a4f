"""KD: knowledge distillation (Hinton et al. 2015)."""

from hintjax._checks import positive
from hintjax.losses import kd_loss, soft_cross_entropy_loss, standardize_logits
from hintjax.method import Method
from hintjax.methods._compared import outputs


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
    return _softened("kd", kd_loss, temperature)


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
    return _softened("soft_targets", soft_cross_entropy_loss, temperature)


def standardized_kd(temperature: float = 2.0) -> Method:
    """KD of standardised logits: the student matches relations, not sizes.

    `kd_loss` of `standardize_logits` of both outputs. The authors' setting on CIFAR-100
    is temperature 2, weight 9. Other losses of logits are standardised likewise, in a
    method of one's own.

    Args:
        temperature: of both softmaxes, > 0.

    Returns:
        The method; see `kd` for what it wants and raises.

    References:
        Sun et al. 2024, Logit Standardization in Knowledge Distillation.
    """

    def loss(student, teacher, *, temperature):
        student, teacher = standardize_logits(student), standardize_logits(teacher)
        return kd_loss(student, teacher, temperature=temperature)

    return _softened("standardized_kd", loss, temperature)


def _softened(name, loss, temperature):
    positive(name, temperature=temperature)
    return outputs(name, lambda s, t, batch: loss(s, t, temperature=temperature))
