"""The cosine loss of DistilBERT (Sanh et al. 2019)."""

from hintjax.losses import cosine_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared


def cosine(pairs: Pairs, *, padding: str | None = None) -> Method:
    """DistilBERT: hidden states point where the teacher's do (see `cosine_loss`).

    Trains nothing beside the student; the networks are of one width. For unequal widths,
    put a regressor before the loss: `fitnets(pairs, loss=cosine_loss)`. DistilBERT pairs
    the last hidden states of both, at weight 1, beside kd at 5 and the masked language
    model at 2.

    Args:
        pairs: (guided layer, hint layer) of hidden states, (batch, n, c) or (batch, c),
            as paths; they are summed.
        padding: the name of the batch's mask of tokens, bool (batch, n), True where a
            token counts; without it all count.

    Returns:
        The method.

    Raises:
        ValueError: without pairs; if the batch lacks the mask.

    References:
        Sanh et al. 2019, DistilBERT, a distilled version of BERT.
    """
    return compared("cosine", pairs, cosine_loss, padding=padding)
