"""A network that stands alone: pixels in, logits out, and no variables beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from hintjax._checks import Refusal, WrongType, form, message, sizes
from hintjax.export.folding import folded
from hintjax.networks import Network, Variables, Wants
from hintjax.networks.network import read_variables

INPUT, OUTPUT = "image", "logits"  # their names in the files


class Standalone(NamedTuple):
    """A network that stands alone, with its preprocessing and its description.

    Attributes:
        apply: `(image) -> logits`. The image holds pixels 0..255 of any dtype, shape
            (batch, height, width, channels).
        shape: height, width and channels of an image.
        about: description that goes into the files: names of the classes, mean and
            standard deviation of the channels. It is JSON.
    """

    apply: Callable[[Array], Array]
    shape: tuple[int, int, int]
    about: Mapping[str, Any]


def standalone(
    network: Network,
    variables: Variables,
    shape: tuple[int, int, int],
    *,
    mean: Shaped[Array | np.ndarray, " channels"],
    std: Shaped[Array | np.ndarray, " channels"],
    classes: Sequence[str] = (),
) -> Standalone:
    """Joins a network, its variables and the standardization of its images.

    `logits = network((image / 255 - mean) / std)`

    The variables become constants, and BatchNorm is folded into the layer before it. So
    the logits differ from those of the network by rounding.

    Args:
        network: network; its output is one array.
        variables: variables of the network.
        shape: height, width and channels of an image.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel, of pixels in [0, 1].
        classes: names of the classes, in the order of the logits.

    Returns:
        The network that stands alone.

    Raises:
        Refusal: if the mean and the standard deviation do not have one number for each
            channel, or the output of the network is more than one array.
    """
    sizes("standalone", 3, shape=shape)
    params, state = read_variables("standalone", "the network's", variables)
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if mean.shape != shape[-1:] or std.shape != shape[-1:]:
        wanted = f"mean and std to have {shape[-1]} numbers, one for each channel"
        raise Refusal(message("standalone", wanted, f"{mean.shape} and {std.shape}"))

    def apply(image):
        # One product and one sum, which int8 files compute without loss.
        scaled = image.astype(jnp.float32) * np.float32(1 / (255 * std))
        inputs = scaled - np.float32(mean / std)
        wants = Wants(output=True)
        shown, _ = network.apply(params, state, inputs, wants=wants, train=False)
        return shown.output

    one = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    output = jax.eval_shape(apply, one)
    if not isinstance(output, jax.ShapeDtypeStruct):
        wanted = "a network whose output is one array"
        raise WrongType(message("standalone", wanted, form(output)))
    about = {
        "input": f"{INPUT}: pixels 0..255, shape (batch, {', '.join(map(str, shape))})",
        "output": f"{OUTPUT}: shape (batch, {', '.join(map(str, output.shape[1:]))})",
        "preprocessing": "inside the file: (image / 255 - mean) / std",
        "mean": mean.tolist(),
        "std": std.tolist(),
        "classes": list(classes),
    }
    return Standalone(folded(apply), shape, about)
