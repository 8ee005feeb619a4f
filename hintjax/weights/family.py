"""The map of names that fits a file."""

from collections.abc import Callable, Mapping

import numpy as np

from hintjax.networks import Variables
from hintjax.weights.convert import Names, paths
from hintjax.weights.convnext import (
    HF_CONVNEXT,
    TIMM_CONVNEXT,
    TORCHVISION_CONVNEXT,
)
from hintjax.weights.mobile import (
    TIMM_EFFICIENTNET_LITE,
    TIMM_MOBILENET_V4,
    efficientnet_lite,
    timm_mobilenet_v3,
    torchvision_mobilenet_v3,
)
from hintjax.weights.names import RESNET, TIMM_DEIT, TIMM_VIT, TORCHVISION_VIT
from hintjax.weights.towers import (
    DINOV2,
    HF_CLIP,
    HF_DINOV2,
    HF_DINOV3,
    HF_SIGLIP,
    HF_SIGLIP_TOWER,
    TIMM_CLIP,
    TIMM_DINOV2,
    TIMM_DINOV2_REGISTERS,
    TIMM_DINOV3,
    TIMM_DINOV3_BIASES,
    TIMM_SIGLIP,
)

# Maps, and functions that make the map of a model.
FAMILIES: tuple[Names | Callable[[Variables], Names], ...] = (
    *(RESNET, TIMM_VIT, TIMM_DEIT, TORCHVISION_VIT),
    *(TIMM_EFFICIENTNET_LITE, efficientnet_lite),
    *(torchvision_mobilenet_v3, timm_mobilenet_v3, TIMM_MOBILENET_V4),
    *(DINOV2, TIMM_DINOV2, TIMM_DINOV2_REGISTERS, HF_DINOV2, HF_DINOV3),
    *(TIMM_DINOV3, TIMM_DINOV3_BIASES, TIMM_CLIP, TIMM_SIGLIP),
    *(HF_CLIP, HF_SIGLIP, HF_SIGLIP_TOWER),
    *(TORCHVISION_CONVNEXT, TIMM_CONVNEXT, HF_CONVNEXT),
)


def family(tensors: Mapping[str, np.ndarray], like: Variables) -> Names:
    """The map of names, among the maps of this package, that finds the most tensors.

    Args:
        tensors: tensors by torch's names.
        like: variables of the Flax model, or their shapes.

    >>> import jax
    >>> from hintjax import models, networks
    >>> from hintjax.weights import TORCHVISION_VIT
    >>> network, images = networks.linen(models.vit_micro(10)), np.zeros((1, 8, 8, 1))
    >>> like = jax.eval_shape(network.init, jax.random.key(0), images)
    >>> family({"class_token": np.zeros((1, 1, 32))}, like) is TORCHVISION_VIT
    True
    """
    leaves = paths(like)
    maps = [one if isinstance(one, Names) else one(like) for one in FAMILIES]

    def found(names: Names) -> int:
        rules = filter(None, map(names.find, leaves))
        return len({name for rule in rules for name in rule.torch} & set(tensors))

    return max(maps, key=found)
