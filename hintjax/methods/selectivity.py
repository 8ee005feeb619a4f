"""NST: neuron selectivity transfer (Huang and Wang 2017)."""

from hintjax.losses import selectivity_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared


def selectivity(pairs: Pairs) -> Method:
    """NST: the channels of the student select positions as the teacher's do.

    It trains nothing beside the student. Sizes and channels may differ. The usual
    setting pairs the three stages of a residual network at weight 50.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; maps (h, w, c).

    Returns:
        The method.

    Raises:
        ValueError: if there are no pairs.

    References:
        Huang and Wang 2017, Like What You Like: Knowledge Distill via Neuron
        Selectivity Transfer.
    """
    return compared("selectivity", pairs, selectivity_loss)
