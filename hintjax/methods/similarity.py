"""SP: similarity-preserving distillation (Tung and Mori 2019)."""

from hintjax.losses import similarity_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import examples


def similarity_preserving(pairs: Pairs, *, padding: str | None = None) -> Method:
    """SP: the same examples are alike for student and teacher (see `similarity_loss`).

    It trains nothing beside the student. The layers of a pair may have any shapes. The
    loss compares the examples of a batch with each other, so it depends on the batch
    size. The usual setting pairs the last group of a residual network, before pooling,
    at weight 3000.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of the
            pairs are summed.
        padding: the name in the batch of the mask of valid positions, for layers of the
            same positions: bool (batch, *positions), True for a valid token or pixel.
            By default all positions are valid.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, or if the batch has no such mask.

    References:
        Tung and Mori 2019, Similarity-Preserving Knowledge Distillation.
    """
    name, few = "similarity_preserving", examples(2)
    return compared(name, pairs, similarity_loss, padding, first=few)
