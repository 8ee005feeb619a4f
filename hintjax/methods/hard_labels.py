"""Hard-label distillation (Touvron et al. 2021, DeiT)."""

from jaxtyping import Array

from hintjax.losses import hard_label_loss
from hintjax.method import Batch, Method
from hintjax.methods._compared import outputs


def hard_labels() -> Method:
    """Hard labels: the teacher's class is one more label (see `hard_label_loss`).

    L = -log softmax(z_s)_y,  y = argmax_c z_t

    It reads both outputs and trains nothing beside the student. It needs no labels and
    has no temperature. In DeiT the task and this method have weight 1/2 each. DeiT's
    transformer has a distillation token, whose head learns from the teacher::

        objective(
            task=weighted(at_head(task(cross_entropy), student="classifier"), 0.5),
            hard=weighted(
                at_head(hard_labels(), student="distillation_classifier"), 0.5
            ),
        )

    Returns:
        The method.

    Raises:
        ValueError: (when a stage is initialized) if the numbers of classes differ.

    References:
        Touvron et al. 2021, Training Data-Efficient Image Transformers and Distillation
        through Attention, Eq. 3.
    """

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return hard_label_loss(student, teacher, where=where)

    return outputs("hard_labels", loss)
