"""Gram matrices of tokens, as TextBrewer has them."""

from hintjax.losses import token_gram_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import same_positions


def token_gram(pairs: Pairs, *, padding: str | None = None) -> Method:
    """Gram matrices: tokens are alike where the teacher's are (see `token_gram_loss`).

    It trains nothing beside the student, which may have any width. The layers of a pair
    have the same tokens. TextBrewer calls it `mmd`, with weight 1 for each pair of
    layers.

    Args:
        pairs: (guided layer, hint layer) of hidden states (batch, *positions, c), as
            paths. The losses of the pairs are summed.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel. By default all positions are
            valid.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, if the layers of a pair have other tokens, or
            if the batch has no such mask.

    References:
        Yang et al. 2020, TextBrewer: An Open-Source Knowledge Distillation Toolkit for
        Natural Language Processing.
    """
    return compared("token_gram", pairs, token_gram_loss, padding, same_positions)
