"""Sizes of published image towers, by the names of their authors.

Every factory takes `classes`, as all factories do, and does not use it: the output is a
vector of features. `hintjax.weights` reads the weights.

| factory | image | patch | features | pixels in 0..1: mean and std |
|---|---|---|---|---|
| `dinov2_*` | 518 (or any multiple of 14) | 14 | class token | ImageNet |
| `dinov3_*` | 224 (or any multiple of 16) | 16 | class token | ImageNet |
| `clip_*` | 224 | 14, 16, 32 | projection | OpenAI |
| `siglip_*` | 224, 384 | 14, 16 | attention pooling | 0.5, 0.5 |

ImageNet has the mean (0.485, 0.456, 0.406) and the std (0.229, 0.224, 0.225). OpenAI
has (0.48145466, 0.4578275, 0.40821073) and (0.26862954, 0.26130258, 0.27577711).
"""

from flax import linen as nn
from jax import Array

from hintjax.models.tower import ImageTower, quick_gelu
from hintjax.models.transformer import exact_gelu

OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

Size = tuple[int, int, int, int]  # width, depth, heads and hidden channels
SMALL, BASE = (384, 12, 6, 1536), (768, 12, 12, 3072)
LARGE, GIANT = (1024, 24, 16, 4096), (1536, 40, 24, 4096)
HUGE = (1280, 32, 20, 5120)
SHAPE_OPTIMIZED = (1152, 27, 16, 4304)


def tanh_gelu(x: Array) -> Array:
    """GELU with the tanh in place of the error function, as in SigLIP."""
    return nn.gelu(x, approximate=True)


def _dinov2(size: Size, registers: int = 0, gated: bool = False) -> ImageTower:
    """DINOv2, with a patch of 14x14."""
    activation = None if gated else exact_gelu
    return ImageTower(
        14,
        *size,
        registers=registers,
        activation=activation,
        scaled=True,
    )


def dinov2_vits14(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-S/14: 384 features, 22.056M parameters for images of 518x518."""
    return _dinov2(SMALL)


def dinov2_vitb14(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-B/14: 768 features, 86.580M parameters for images of 518x518."""
    return _dinov2(BASE)


def dinov2_vitl14(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-L/14: 1024 features, 304.368M parameters for images of 518x518."""
    return _dinov2(LARGE)


def dinov2_vitg14(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-g/14, SwiGLU: 1536 features, 1136.479M parameters at 518x518."""
    return _dinov2(GIANT, gated=True)


def dinov2_vits14_reg(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-S/14 with 4 registers: 384 features."""
    return _dinov2(SMALL, registers=4)


def dinov2_vitb14_reg(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-B/14 with 4 registers: 768 features."""
    return _dinov2(BASE, registers=4)


def dinov2_vitl14_reg(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-L/14 with 4 registers: 1024 features."""
    return _dinov2(LARGE, registers=4)


def dinov2_vitg14_reg(classes: int = 0) -> ImageTower:
    """DINOv2 ViT-g/14 with 4 registers, SwiGLU: 1536 features."""
    return _dinov2(GIANT, registers=4, gated=True)


def _dinov3(size: Size, gated: bool = False) -> ImageTower:
    """DINOv3, with a patch of 16x16, 4 registers and rotary positions."""
    activation = None if gated else exact_gelu
    return ImageTower(
        16,
        *size,
        registers=4,
        activation=activation,
        scaled=True,
        epsilon=1e-5,
        rotated=True,
    )


def dinov3_vits16(classes: int = 0) -> ImageTower:
    """DINOv3 ViT-S/16: 384 features."""
    return _dinov3(SMALL)


def dinov3_vits16plus(classes: int = 0) -> ImageTower:
    """DINOv3 ViT-S+/16, SwiGLU: 384 features."""
    return _dinov3(SMALL, gated=True)


def dinov3_vitb16(classes: int = 0) -> ImageTower:
    """DINOv3 ViT-B/16: 768 features."""
    return _dinov3(BASE)


def dinov3_vitl16(classes: int = 0) -> ImageTower:
    """DINOv3 ViT-L/16: 1024 features."""
    return _dinov3(LARGE)


def dinov3_vith16plus(classes: int = 0) -> ImageTower:
    """DINOv3 ViT-H+/16, SwiGLU: 1280 features."""
    return _dinov3(HUGE, gated=True)


def _clip(patch: int, size: Size, projection: int) -> ImageTower:
    """CLIP's image tower, with OpenAI's activation."""
    return ImageTower(
        patch,
        *size,
        activation=quick_gelu,
        epsilon=1e-5,
        norm_first=True,
        projection=projection,
        image_normalization=OPENAI,
    )


def clip_vitb32(classes: int = 0) -> ImageTower:
    """CLIP ViT-B/32: 512 features, which are compared with texts."""
    return _clip(32, BASE, projection=512)


def clip_vitb16(classes: int = 0) -> ImageTower:
    """CLIP ViT-B/16: 512 features, which are compared with texts."""
    return _clip(16, BASE, projection=512)


def clip_vitl14(classes: int = 0) -> ImageTower:
    """CLIP ViT-L/14: 768 features, which are compared with texts."""
    return _clip(14, LARGE, projection=768)


def _siglip(patch: int, size: Size) -> ImageTower:
    """The image tower of SigLIP and SigLIP 2."""
    return ImageTower(
        patch,
        *size,
        class_token=False,
        activation=tanh_gelu,
        image_normalization=HALF,
    )


def siglip_vitb16(classes: int = 0) -> ImageTower:
    """SigLIP ViT-B/16: 768 features, which are compared with texts."""
    return _siglip(16, BASE)


def siglip_vitl16(classes: int = 0) -> ImageTower:
    """SigLIP ViT-L/16: 1024 features, which are compared with texts."""
    return _siglip(16, LARGE)


def siglip_so400m14(classes: int = 0) -> ImageTower:
    """SigLIP So400m/14: 1152 features, which are compared with texts."""
    return _siglip(14, SHAPE_OPTIMIZED)
