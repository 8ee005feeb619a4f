"""DIST: distillation from a stronger teacher (Huang et al. 2022)."""

from jaxtyping import Array

from hintjax._checks import not_negative, positive
from hintjax.losses import dist_loss
from hintjax.method import Batch, Method
from hintjax.methods._compared import outputs


def dist(
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    *,
    padding: str | None = None,
) -> Method:
    """DIST: the student's output correlates with the teacher's (see `dist_loss`).

    It reads both outputs and trains nothing beside the student. The loss compares the
    examples of a batch with each other, so it depends on the batch size. The authors'
    default is weight 1, with beta, gamma and the temperature at 1.

    Args:
        beta: weight of the correlation within examples, >= 0.
        gamma: weight of the correlation between examples, >= 0.
        temperature: the temperature of both softmaxes, > 0.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method.

    Raises:
        ValueError: if the temperature is not positive, if a weight is negative, or
            (when a stage is initialized) if the outputs differ in shape, or have 1
            class (or 2, with gamma 0), so that the loss is constant; if the batch has
            no such mask.

    References:
        Huang et al. 2022, Knowledge Distillation from A Stronger Teacher.
    """
    positive("dist", temperature=temperature)
    not_negative("dist", beta=beta, gamma=gamma)
    hyper = {"beta": beta, "gamma": gamma, "temperature": temperature}

    def loss(
        student: Array, teacher: Array, batch: Batch, where: Array | None
    ) -> Array:
        return dist_loss(student, teacher, where=where, **hyper)

    # The probabilities of two classes always correlate: with 1 or with -1.
    least = 2 if gamma > 0 else 3
    return outputs("dist", loss, padding, coupled=True, least=least)
