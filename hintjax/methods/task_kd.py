"""KD for tasks other than classification: its form follows the output's meaning."""

from collections.abc import Sequence

from jaxtyping import Array

from hintjax._checks import instance, labels, needed, positive
from hintjax.losses import binary_kd_loss, hint_loss, kd_loss
from hintjax.method import Batch, Method
from hintjax.methods._compared import outputs
from hintjax.metrics import ignored, not_ignored


def binary_kd(temperature: float = 4.0) -> Method:
    """KD of sigmoid outputs, for two classes or for many at once.

    See `binary_kd_loss`: the divergence of each class is summed. It reads both outputs
    and trains nothing beside the student.

    Args:
        temperature: the temperature of both sigmoids, > 0.

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, or (when a stage is
            initialized) if the numbers of logits differ.

    References:
        Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network.
    """
    positive("binary_kd", temperature=temperature)

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return binary_kd_loss(student, teacher, temperature=temperature, where=where)

    return outputs("binary_kd", loss, least=1)


def regression_kd() -> Method:
    """KD of a regression: the mean squared error to the teacher's output.

    L = mean_i (s_i - t_i)^2, over the outputs of an example (see `hint_loss`). It reads
    both outputs and trains nothing beside the student.

    Returns:
        The method.

    Raises:
        ValueError: (when a stage is initialized) if the outputs differ in shape.

    References:
        Ba and Caruana 2014, Do Deep Nets Really Need to be Deep?, Eq. 1 (on logits,
        with a factor 1/2 and a sum over outputs).
    """

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return hint_loss(student, teacher, where=where)

    return outputs("regression_kd", loss, least=1)


def dense_kd(
    temperature: float = 4.0,
    *,
    ignore: int | Sequence[int] = (),
    label: str = "label",
) -> Method:
    """KD at every position, for dense outputs, as in segmentation.

    L = mean_p kd_loss(s_p, t_p), over the positions p of an example whose label is not
    in `ignore`. An example without such positions has the loss 0. The method reads both
    outputs, (batch, *positions, classes), and trains nothing beside the student.

    Args:
        temperature: the temperature of both softmaxes, > 0.
        ignore: integer labels of the positions that are left out, such as 255. By
            default every position counts, and no labels are needed.
        label: the name of the labels in the batch, (batch, *positions).

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, (when a stage is initialized) if
            the outputs differ in shape, or (when it is traced) if labels are to be
            ignored and the batch has none for each position.

    References:
        Liu et al. 2019, Structured Knowledge Distillation for Semantic Segmentation,
        Eq. 1 (pixel-wise, at temperature 1).
    """
    positive("dense_kd", temperature=temperature)
    instance("dense_kd", str, label=label)
    left_out = ignored("dense_kd", ignore)

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        if left_out:
            given = needed("dense_kd", batch, label, "Name the labels with label=.")
            labels("dense_kd", student.shape[:-1], **{f"the label {label!r}": given})
            where = not_ignored(given, left_out)
        return kd_loss(student, teacher, temperature=temperature, where=where)

    return outputs("dense_kd", loss)._replace(ignored=left_out)
