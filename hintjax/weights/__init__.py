"""Weights of torch models, without torch: safetensors files into Flax models.

To use a teacher of torchvision, run once where torch is installed::

    from safetensors.torch import save_file
    from torchvision.models import resnet50
    save_file(resnet50(weights="DEFAULT").state_dict(), "resnet50.safetensors")

The files `model.safetensors` of timm and transformers can be read as they are; a file
`.pth` is converted with `save_file(torch.load(path, weights_only=True), ...)`. After
that, torch is not needed::

    import jax, jax.numpy as jnp
    import hintjax as hj
    from hintjax import models, weights

    teacher = hj.linen(models.imagenet_resnet50(classes=1000))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    like = jax.eval_shape(teacher.init, jax.random.key(0), images)
    tensors = weights.read_safetensors("resnet50.safetensors")
    variables = weights.from_torch(tensors, weights.RESNET, like)

Images are channels last, and normalized as the images that the weights were trained on.
A model says its normalization as `image_normalization`; `hintjax.networks.renormalized`
converts the images of a dataset to it, and so does the command with `--weights`.

| names | files | model |
|---|---|---|
| `RESNET` | torchvision and timm: resnet18, 34, 50 | `models.imagenet_resnet18`, ... |
| `TIMM_VIT` | timm: vit_*_patch16_224 and the like | `models.VisionTransformer` |
| `TIMM_DEIT` | timm: deit_*_distilled_* | the same, `distillation=True` |
| `TORCHVISION_VIT` | torchvision: vit_b_16 and the like | `models.VisionTransformer` |
| `TIMM_EFFICIENTNET_LITE` | timm: tf_efficientnet_lite* | `models.efficientnet_lite0` |
| `efficientnet_lite` | efficientnet-lite-pytorch | the same |
| `torchvision_mobilenet_v3` | torchvision | `models.mobilenet_v3_large`, ... |
| `timm_mobilenet_v3` | timm: mobilenetv3_large_100, mobilenetv3_small_100 | the same |
| `TIMM_MOBILENET_V4` | timm: mobilenetv4_conv_* | `models.mobilenet_v4_conv_*` |
| `TORCHVISION_CONVNEXT` | torchvision: convnext_* | `models.convnext_tiny`, ... |
| `TIMM_CONVNEXT` | timm: convnext_tiny and the like | the same |
| `HF_CONVNEXT` | transformers: ConvNextForImageClassification | the same |
| `DINOV2` | the authors': dinov2_vit*14, also with registers | `models.dinov2_*` |
| `TIMM_DINOV2` | timm: vit_*_patch14_dinov2 | the same |
| `TIMM_DINOV2_REGISTERS` | timm: vit_*_patch14_reg4_dinov2 | the same |
| `HF_DINOV2` | transformers: Dinov2Model, also with registers | the same |
| `HF_DINOV3` | transformers: DINOv3ViTModel | `models.dinov3_*` |
| `TIMM_DINOV3` | timm: vit_*_patch16_dinov3 | the same |
| `TIMM_DINOV3_BIASES` | timm: vit_*_patch16_dinov3_qkvb | the same |
| `HF_CLIP` | transformers: CLIPModel, or its image tower | `models.clip_*` |
| `TIMM_CLIP` | timm: vit_*_clip_quickgelu_224 | the same |
| `HF_SIGLIP` | transformers: SiglipModel | `models.siglip_*` |
| `HF_SIGLIP_TOWER` | transformers: the image tower alone | the same |
| `TIMM_SIGLIP` | timm: vit_*_siglip_224 and the like | the same |

`family` finds the map of a file from its keys. Those in small letters are functions,
because torch numbers the blocks of such a model in a row. The names of transformers are
the names in its files (`save_pretrained`).

A transformer may have another resolution than its file: `from_torch` resamples the
positions of a square grid to a square grid as timm does, and `resample_positions` to
any grid (put its result in place of the tensor). DINOv2's authors resample slightly
differently (without an antialias). DINOv3 has no learned positions.

A file that does not match its model is refused, but shapes do not determine everything.
The user must give the right number of heads. The models assume that bottlenecks have
their stride in the 3x3 convolution (v1.5), that the GELU of a ViT is exact, and that
LayerNorm's epsilon is 1e-6 (in an `ImageTower` both are arguments). OpenAI's weights of
CLIP want the approximate GELU of `quickgelu`; other weights want the exact one. SigLIP
was trained with a GELU by tanh, which timm replaces by the exact one in some sizes. The
variances of timm's MobileNetV3 and MobileNetV4 are shifted, because their BatchNorms
have the epsilon 1e-5 and those of the models 1e-3. The keys of timm's
mobilenetv4_conv_aa_* and mobilenetv4_conv_blur_* are those of mobilenetv4_conv_*, but
the models do not smooth before a stride and give other numbers. Not covered: variants
with other layers (resnet50d, ResNeXt, Wide ResNet; ConvNeXt V2; classifiers of DINOv2
and CLIP; DINOv3 ViT-7B; SigLIP with average pooling; MobileNetV3 of TensorFlow;
MobileNetV4-Hybrid).
"""

from hintjax.weights.convert import How, Names, Rule, from_torch
from hintjax.weights.convnext import (
    HF_CONVNEXT,
    TIMM_CONVNEXT,
    TORCHVISION_CONVNEXT,
)
from hintjax.weights.family import family
from hintjax.weights.mobile import (
    TIMM_EFFICIENTNET_LITE,
    TIMM_MOBILENET_V4,
    efficientnet_lite,
    timm_mobilenet_v3,
    torchvision_mobilenet_v3,
)
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
from hintjax.weights.positions import resample_positions
from hintjax.weights.safetensors import read_safetensors
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

__all__ = [
    "DINOV2",
    "HF_CLIP",
    "HF_CONVNEXT",
    "HF_DINOV2",
    "HF_DINOV3",
    "HF_SIGLIP",
    "HF_SIGLIP_TOWER",
    "RESNET",
    "TIMM_CLIP",
    "TIMM_CONVNEXT",
    "TIMM_DEIT",
    "TIMM_DINOV2",
    "TIMM_DINOV2_REGISTERS",
    "TIMM_DINOV3",
    "TIMM_DINOV3_BIASES",
    "TIMM_EFFICIENTNET_LITE",
    "TIMM_MOBILENET_V4",
    "TIMM_SIGLIP",
    "TIMM_VIT",
    "TORCHVISION_CONVNEXT",
    "TORCHVISION_VIT",
    "How",
    "Names",
    "Rule",
    "attention",
    "batch_norm",
    "conv",
    "efficientnet_lite",
    "family",
    "from_torch",
    "layer_norm",
    "linear",
    "read_safetensors",
    "resample_positions",
    "timm_mobilenet_v3",
    "torchvision_mobilenet_v3",
]
