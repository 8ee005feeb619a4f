"""PKT: probabilistic knowledge transfer (Passalis and Tefas 2018)."""

from hintjax.losses import probability_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import examples


def probability_transfer(pairs: Pairs) -> Method:
    """PKT: each example has the same neighbors for both (see `probability_loss`).

    It trains nothing beside the student. The layers of a pair may have any shapes. The
    loss compares the examples of a batch with each other, so it depends on the batch
    size. The usual setting pairs the pooled features (the input of the classifier) at
    weight 30000.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of the
            pairs are summed.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs.

    References:
        Passalis and Tefas 2018, Learning Deep Representations with Probabilistic
        Knowledge Transfer.
    """
    few = examples(2)
    return compared("probability_transfer", pairs, probability_loss, first=few)
