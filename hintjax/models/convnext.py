"""ConvNeXt: depthwise 7x7 convolutions and an MLP, with LayerNorm."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool
from hintjax.models.tower import IMAGENET
from hintjax.models.transformer import Scale, exact_gelu, layer_norm

EPSILON = 1e-6  # of the LayerNorms
SMALL = nn.initializers.truncated_normal(0.02)
RATIO = 4  # channels of the hidden layer, over the width


class Patches(nn.Module):
    """A convolution whose kernel is its stride, and LayerNorm before or after it."""

    features: int
    side: int
    norm_first: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the patches."""
        sides = (self.side, self.side)
        norm = layer_norm(EPSILON, name="norm")
        patches = nn.Conv(
            self.features, sides, sides, "VALID", kernel_init=SMALL, name="conv"
        )
        return patches(norm(x)) if self.norm_first else norm(patches(x))


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, and two linear maps around a GELU.

    Its layers are `depthwise`, `norm`, `hidden` (before the GELU), `out` and `scale`.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h w channels"]:
        """Returns the maps plus the scaled result of the block."""
        width = x.shape[-1]
        y = nn.Conv(
            width,
            (7, 7),
            padding=((3, 3), (3, 3)),
            feature_group_count=width,
            kernel_init=SMALL,
            name="depthwise",
        )(x)
        y = layer_norm(EPSILON, name="norm")(y)
        y = nn.Dense(RATIO * width, kernel_init=SMALL, name="hidden")(y)
        y = nn.Dense(width, kernel_init=SMALL, name="out")(exact_gelu(y))
        return x + Scale(name="scale")(y)


class ConvNeXtGroup(nn.Module):
    """Blocks of one resolution, after `downsample`, which the first group lacks."""

    features: int
    blocks: int
    downsampled: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the last block."""
        if self.downsampled:
            x = Patches(self.features, 2, norm_first=True, name="downsample")(x)
        for number in range(1, self.blocks + 1):
            x = Block(name=f"block{number}")(x)
        return x


class ConvNeXt(nn.Module):
    """ConvNeXt: patches of 4x4 pixels, four groups of blocks, a linear classifier.

    Hint paths: `stem`, `group1` ... `group4` (1/4, 1/8, 1/16 and 1/32 of the image),
    `pool` (the pooled vector), `norm` (the pooled vector, normalized) and `classifier`
    (the logits). `group1/block1` ... are the blocks, and inside each block `depthwise`,
    `norm`, `hidden`, `out` and `scale`. There is no stochastic depth, so `train` has no
    effect. `hintjax.weights` reads the weights of torchvision, timm and transformers,
    which want images of 224x224 (or 288x288) in ImageNet's normalization.

    Args:
        blocks: number of blocks of each of the four groups.
        widths: channels of the four groups.
        classes: number of logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = convnext_tiny(classes=10), jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)

    References:
        Liu et al., A ConvNet for the 2020s, CVPR 2022; facebookresearch/ConvNeXt.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int

    @property
    def image_normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the weights want, for pixels in 0..1."""
        return IMAGENET

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        if len(self.blocks) != len(self.widths):
            wanted = f"a width for each of {len(self.blocks)} groups"
            raise Refusal(message("ConvNeXt", wanted, f"{self.widths}"))
        x = Patches(self.widths[0], 4, norm_first=False, name="stem")(x)
        for number, (blocks, features) in enumerate(
            zip(self.blocks, self.widths, strict=True), start=1
        ):
            group = ConvNeXtGroup(features, blocks, number > 1, name=f"group{number}")
            x = group(x)
        x = layer_norm(EPSILON, name="norm")(GlobalAveragePool(name="pool")(x))
        return nn.Dense(self.classes, kernel_init=SMALL, name="classifier")(x)


def convnext_tiny(classes: int) -> ConvNeXt:
    """ConvNeXt-T, 28.589M parameters for 1000 classes."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), classes)


def convnext_small(classes: int) -> ConvNeXt:
    """ConvNeXt-S, 50.224M parameters for 1000 classes."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), classes)


def convnext_base(classes: int) -> ConvNeXt:
    """ConvNeXt-B, 88.591M parameters for 1000 classes."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), classes)


def convnext_large(classes: int) -> ConvNeXt:
    """ConvNeXt-L, 197.767M parameters for 1000 classes."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), classes)
