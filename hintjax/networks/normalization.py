"""Images in the normalization that a network was trained on."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from hintjax._checks import Refusal, instance, message
from hintjax.networks.network import Features, Network, Variables, Wants

Channels = Sequence[float] | np.ndarray | Array
Normalization = tuple[Channels, Channels]  # mean and standard deviation


def renormalized(
    network: Network, given: Normalization, wanted: Normalization
) -> Network:
    """The network, for images in another normalization than its own.

    Teacher and student read the same images, (x - m) / s for pixels x from 0 to 1. A
    teacher that was trained on (x - m') / s' converts them: each channel z becomes (z s
    + m - m') / s'. Images of one channel become images of as many channels as m' has,
    which are all equal but for m' and s'.

    Args:
        network: the network.
        given: mean m and standard deviation s of each channel, of the images that are
            given.
        wanted: mean m' and standard deviation s' of each channel, of the images that
            the network wants, such as `image_normalization` of a model.

    Returns:
        The network, with the same parameters and state.

    Raises:
        Refusal: if the channels do not match.

    >>> from hintjax import models, networks
    >>> tower = models.dinov2_vits14()
    >>> half = ((0.5,) * 3, (0.5,) * 3)  # images in -1..1
    >>> teacher = renormalized(networks.linen(tower), half, tower.image_normalization)
    """
    instance("renormalized", Network, network=network)
    (mean, std), (own_mean, own_std) = (
        [np.atleast_1d(np.asarray(values, np.float64)) for values in pair]
        for pair in (given, wanted)
    )
    shapes = [array.shape for array in (mean, std, own_mean, own_std)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[3]:
        text = "a mean and a std for each channel"
        raise Refusal(message("renormalized", text, f"the shapes {shapes}"))
    if shapes[0] not in ((1,), shapes[2]):
        text = f"images of 1 or {len(own_mean)} channels"
        do = "The network was trained on such images."
        raise Refusal(message("renormalized", text, f"{len(mean)}", do))
    factor, offset = std / own_std, (mean - own_mean) / own_std

    def converted(images: Array) -> Array:
        return images * factor.astype(images.dtype) + offset.astype(images.dtype)

    def init(key: Key[Array, ""], inputs: Array) -> Variables:
        return network.init(key, converted(inputs))

    def apply(
        params: Any,
        state: Any,
        inputs: Array,
        *,
        wants: Wants,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Features, Any]:
        images = converted(inputs)
        return network.apply(params, state, images, wants=wants, train=train, key=key)

    def layers(
        params: Any, state: Any, inputs: Array
    ) -> dict[str, jax.ShapeDtypeStruct]:
        return network.layers(params, state, jax.eval_shape(converted, inputs))

    return Network(init, apply, layers)
