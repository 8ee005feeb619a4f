"""CWD: channel-wise distillation (Shu et al. 2021)."""

from functools import partial

from hintjax._checks import positive
from hintjax.losses import channel_loss
from hintjax.method import Method, Pairs
from hintjax.methods._compared import compared


def channel_wise(pairs: Pairs, *, temperature: float = 1.0) -> Method:
    """CWD: each channel is active at the same positions (see `channel_loss`).

    Trains nothing beside the student; the maps of a pair have one shape. For maps of
    unequal channels, put a regressor before the loss:
    `fitnets(pairs, regressor=regressors.linear, loss=channel_loss)`. MMRazor pairs the
    maps of logits of segmentation networks, at weight 5.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths; they are summed.
        temperature: of the softmax over positions, > 0.

    Returns:
        The method.

    Raises:
        ValueError: without pairs, or if the temperature is not positive.

    References:
        Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction.
    """
    positive("channel_wise", temperature=temperature)
    loss = partial(channel_loss, temperature=temperature)
    return compared("channel_wise", pairs, loss)
