"""Weights from the torch world, without torch: safetensors files into Flax models.

A teacher that torchvision published. Where torch is installed, once::

    from safetensors.torch import save_file
    from torchvision.models import resnet50
    save_file(resnet50(weights="DEFAULT").state_dict(), "resnet50.safetensors")

From then on, without torch::

    import jax, jax.numpy as jnp
    import hintjax as hj
    from hintjax import models, weights

    teacher = hj.linen(models.imagenet_resnet50(classes=1000))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    like = jax.eval_shape(teacher.init, jax.random.key(0), images)
    tensors = weights.read_safetensors("resnet50.safetensors")
    variables = weights.from_torch(tensors, weights.RESNET, like)

Images are channels last, and normalized as those that the weights were trained on.

| names | files | model |
|---|---|---|
| `RESNET` | torchvision and timm: resnet18, 34, 50 | `models.imagenet_resnet18`, ... |
| `TIMM_VIT` | timm: vit_*_patch16_224 and the like | `models.VisionTransformer` |
| `TIMM_DEIT` | timm: deit_*_distilled_* | the same, `distillation=True` |
| `TORCHVISION_VIT` | torchvision: vit_b_16 and the like | `models.VisionTransformer` |

A file that does not match its model is refused, but its shapes do not say all: the
number of heads is for the user to get right; bottlenecks stride in the 3x3 convolution
(v1.5), the GELU is exact, and LayerNorm's epsilon is 1e-6. Not covered: variants with
other layers (resnet50d, ResNeXt, Wide ResNet; ViTs with registers, layer scale, average
pooling, or without a position for the class token).
"""

from hintjax.weights.convert import How, Names, Rule, from_torch
from hintjax.weights.names import (
    RESNET,
    TIMM_DEIT,
    TIMM_VIT,
    TORCHVISION_VIT,
    attention,
    batch_norm,
    conv,
    layer_norm,
    linear,
)
from hintjax.weights.safetensors import read_safetensors

__all__ = [
    "RESNET",
    "TIMM_DEIT",
    "TIMM_VIT",
    "TORCHVISION_VIT",
    "How",
    "Names",
    "Rule",
    "attention",
    "batch_norm",
    "conv",
    "from_torch",
    "layer_norm",
    "linear",
    "read_safetensors",
]
