"""KD: knowledge distillation (Hinton et al. 2015)."""

from collections.abc import Callable

from jaxtyping import Array, Float, ScalarLike

from hintjax._checks import positive
from hintjax.losses import kd_loss, soft_cross_entropy_loss, standardize_logits
from hintjax.method import Batch, Method
from hintjax.methods._compared import outputs


def kd(temperature: float = 4.0, *, padding: str | None = None) -> Method:
    """KD: the student's softened output matches the teacher's (see `kd_loss`).

    It reads both outputs and trains nothing beside the student. The usual setting on
    CIFAR-100 is temperature 4 and weight 0.9, with the task at weight 0.1. Outputs may
    have positions (tokens, pixels): (batch, *positions, classes).

    Args:
        temperature: the temperature of both softmaxes, > 0.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, (when a stage is initialized)
            if the outputs differ in shape or have 1 class, or if the batch has no such
            mask.

    References:
        Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network.
    """
    return _softened("kd", kd_loss, temperature, padding)


def soft_targets(temperature: float = 3.0, *, padding: str | None = None) -> Method:
    """KD as in FitNets' second stage: cross-entropy of the softened outputs.

    `H(P_T^tau, P_S^tau)`, without the factor tau^2 of `kd`. In the paper its weight
    lambda decays from 4 to 1 (`lambda_decay`), and the task has weight 1.

    Args:
        temperature: tau, > 0; the paper's is 3.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method. It reads the same features and raises the same errors as `kd`.

    References:
        Romero et al. 2015, FitNets: Hints for Thin Deep Nets, Eq. 2.
    """
    return _softened("soft_targets", soft_cross_entropy_loss, temperature, padding)


def standardized_kd(temperature: float = 2.0, *, padding: str | None = None) -> Method:
    """KD of standardized logits: the student matches relations, not sizes.

    It applies `kd_loss` to `standardize_logits` of both outputs. The authors' setting
    on CIFAR-100 is temperature 2 and weight 9. To standardize another loss of logits,
    write a method with that loss in the same way.

    Args:
        temperature: the temperature of both softmaxes, > 0.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method. It reads the same features as `kd`.

    Raises:
        ValueError: as `kd`; and (when a stage is initialized) if there are only two
            classes.

    References:
        Sun et al. 2024, Logit Standardization in Knowledge Distillation.
    """

    def loss(
        student: Array,
        teacher: Array,
        *,
        temperature: ScalarLike,
        where: Array | None,
    ) -> Array:
        student, teacher = (
            standardize_logits(x, where=where) for x in (student, teacher)
        )
        return kd_loss(student, teacher, temperature=temperature, where=where)

    # Two standardized logits are 1 and -1, whatever the network learns.
    return _softened("standardized_kd", loss, temperature, padding, least=3)


def _softened(
    name: str,
    loss: Callable[..., Float[Array, " batch"]],
    temperature: ScalarLike,
    padding: str | None,
    least: int = 2,
) -> Method:
    """A loss of the two outputs at a temperature, as a method."""
    positive(name, temperature=temperature)

    def of_outputs(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return loss(student, teacher, temperature=temperature, where=where)

    return outputs(name, of_outputs, padding, least=least)
