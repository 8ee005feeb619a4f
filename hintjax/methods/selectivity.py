"""NST: neuron selectivity transfer (Huang and Wang 2017)."""

from hintjax.losses import selectivity_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared
from hintjax.methods._shapes import maps, places


def selectivity(pairs: Pairs, *, padding: str | None = None) -> Method:
    """NST: the channels of the student select positions as the teacher's do.

    It trains nothing beside the student. Sizes and channels may differ. The usual
    setting pairs the three stages of a residual network at weight 50.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c),
            tokens (n, c) or volumes (d, h, w, c).
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel, at the smaller size of each
            pair. By default all positions are valid.

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs, if a layer has no positions, or if the batch
            has no such mask.

    References:
        Huang and Wang 2017, Like What You Like: Knowledge Distill via Neuron
        Selectivity Transfer.
    """
    return compared("selectivity", pairs, selectivity_loss, padding, maps, places)
