"""SP: similarity-preserving distillation (Tung and Mori 2019)."""

from hintjax.losses import similarity_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared


def similarity_preserving(pairs: Pairs) -> Method:
    """SP: the same examples are alike for student and teacher (see `similarity_loss`).

    Trains nothing beside the student; the layers of a pair may have any shapes. The
    examples of a batch are compared with each other, so its size matters. The field
    pairs the last group of a residual network, before pooling, at weight 3000.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; they are summed.

    Returns:
        The method.

    Raises:
        ValueError: without pairs.

    References:
        Tung and Mori 2019, Similarity-Preserving Knowledge Distillation.
    """
    return compared("similarity_preserving", pairs, similarity_loss)
