"""DKD: decoupled knowledge distillation (Zhao et al. 2022)."""

from jaxtyping import Array

from hintjax._checks import instance, needed, not_negative, positive
from hintjax.losses import decoupled_kd_loss
from hintjax.method import Batch, Method
from hintjax.methods._compared import outputs


def decoupled_kd(
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    *,
    label: str = "label",
    padding: str | None = None,
) -> Method:
    """DKD: KD of the label's class and of the others apart (see `decoupled_kd_loss`).

    It reads both outputs and trains nothing beside the student. The usual setting on
    CIFAR-100 is temperature 4 and weight 1, which grows over 20 epochs (`warm_up`);
    beta is 2 for ResNet-56 and 110, 6 for WRN and VGG, and 8 for other networks.

    Args:
        alpha: weight of the label's class against all other classes, >= 0.
        beta: weight of the other classes among themselves, >= 0.
        temperature: the temperature of both softmaxes, > 0.
        label: the name of the labels in the batch, one integer for each example or, if
            the outputs have positions, for each position: (batch, *positions).
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, if a weight is negative, or
            (when a stage is initialized) if the outputs differ in shape, or have 1
            class (or 2, with alpha 0), so that the loss is constant; if the batch has
            no such labels or mask.

    References:
        Zhao et al. 2022, Decoupled Knowledge Distillation.
    """
    positive("decoupled_kd", temperature=temperature)
    not_negative("decoupled_kd", alpha=alpha, beta=beta)
    instance("decoupled_kd", str, label=label)

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return decoupled_kd_loss(
            student,
            teacher,
            needed("decoupled_kd", batch, label, "Name the labels with label=."),
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            where=where,
        )

    # One other class among itself has the probability 1.
    return outputs("decoupled_kd", loss, padding, least=2 if alpha > 0 else 3)
