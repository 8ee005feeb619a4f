"""The cosine loss of DistilBERT (Sanh et al. 2019)."""

from hintjax.losses import cosine_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import alike, directions


def cosine(pairs: Pairs, *, padding: str | None = None) -> Method:
    """DistilBERT: hidden states point where the teacher's do (see `cosine_loss`).

    It trains nothing beside the student, and both networks must have the same width.
    For unequal widths, put a regressor before the loss:
    `fitnets(pairs, loss=cosine_loss)`. DistilBERT pairs the last hidden states of both
    networks at weight 1, beside kd at weight 5 and the masked language model at
    weight 2.

    Args:
        pairs: (guided layer, hint layer) of hidden states, (batch, *positions, c), as
            paths. The losses of the pairs are summed.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, if the layers of a pair differ in shape, or
            if the batch has no such mask.

    References:
        Sanh et al. 2019, DistilBERT, a distilled version of BERT.
    """
    return compared("cosine", pairs, cosine_loss, padding, alike, directions)
