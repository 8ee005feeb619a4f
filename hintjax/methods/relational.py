"""RKD: relational knowledge distillation (Park et al. 2019)."""

from hintjax._checks import Refusal, message, not_negative
from hintjax._numerics import masked_mean
from hintjax.losses import angle_loss, distance_loss
from hintjax.method import (
    Applied,
    Batch,
    Context,
    Method,
    Pairs,
    hints_of,
    nothing,
    total,
)
from hintjax.methods._shapes import checked, examples
from hintjax.networks import Features


def relational(pairs: Pairs, *, distance: float = 25.0, angle: float = 50.0) -> Method:
    """RKD: the batch has the same shape for both (`distance_loss`, `angle_loss`).

    The loss is `distance RKD-D + angle RKD-A`. It trains nothing beside the student.
    The layers of a pair may have any shapes. The loss compares the examples of a batch
    with each other, so it depends on the batch size. The usual setting pairs the pooled
    features (the input of the classifier) at weight 1 (25 and 50 are inside the loss).

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of the
            pairs are summed.
        distance: weight of the distances, >= 0; at 0 distances are not computed.
        angle: weight of the angles, >= 0; at 0 angles are not computed.

    Returns:
        The method. It reports `distance` and `angle`, without their weights.

    Raises:
        ValueError: if there are no pairs, if a weight is negative, or if both are 0.

    References:
        Park et al. 2019, Relational Knowledge Distillation.
    """
    weights = {"distance": distance, "angle": angle}
    not_negative("relational", **weights)
    if not any(weights.values()):
        raise Refusal(message("relational", "at least one weight > 0", f"{weights}"))
    losses = {"distance": distance_loss, "angle": angle_loss}
    student_wants, teacher_wants = hints_of("relational", pairs)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        parts, metrics, where = [], {}, batch.get("where")
        for name, weight in weights.items():
            if weight == 0:
                continue
            values = total(
                losses[name](student.hints[guided], teacher.hints[hint], where=where)
                for guided, hint in pairs
            )
            parts.append(weight * values)
            metrics[name] = masked_mean(values, where)
        return total(parts), memory, metrics

    method = Method(student_wants, teacher_wants, nothing, apply)
    return checked("relational", pairs, method, first=examples(3))
