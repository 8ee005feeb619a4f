"""EfficientNet-Lite: inverted bottlenecks without squeeze and excitation."""

import math

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool
from hintjax.models.inverted import ConvNorm, InvertedBottleneck, in_eights

STEM, HEAD = 32, 1280  # channels of the stem and of the head, in every size
# Each group: kernel, stride of the first block, expansion, channels, blocks.
GROUPS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class InvertedGroup(nn.Module):
    """Inverted bottlenecks of one width; the first block has the stride."""

    features: int
    blocks: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the last block."""
        for number in range(1, self.blocks + 1):
            stride = self.stride if number == 1 else 1
            hidden = self.expansion * x.shape[-1]
            x = InvertedBottleneck(
                self.features, hidden, self.kernel, stride, name=f"block{number}"
            )(x, train)
        return x


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite: a stem, seven groups of inverted bottlenecks and a head.

    Hint paths: `stem`, `group1` ... `group7`, `head` (a 1x1 convolution), `pool` (the
    pooled vector) and `classifier` (the logits). The maps of `group1` ... `group7` are
    1/2, 1/4, 1/8, 1/16, 1/16, 1/32 and 1/32 of the image; `group2`, `group3`, `group5`
    and `group7` are the last of their resolution. `group1/block1` ... are the blocks,
    and inside each block `expand`, `depthwise` (both after ReLU6), `project` and `sum`.

    The published weights (`hintjax.weights`) want RGB images as (x - 127) / 128, for
    pixels x from 0 to 255; with `--weights`, the command converts images to this
    `image_normalization`. The published sizes of images are 224, 240, 260, 280 and 300
    for Lite0 to Lite4. The dropout and the stochastic depth of the paper are not here.

    Args:
        classes: number of logits.
        width: factor on the channels of the groups, which are rounded to multiples of
            8. The stem and the head keep their channels.
        depth: factor on the number of blocks of `group2` to `group6`, rounded up.
        stem: number of channels of the stem.
        head: number of channels of the head.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = efficientnet_lite0(classes=10), jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)
        >>> model.blocks
        (1, 2, 2, 3, 3, 4, 1)

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural
        Networks, ICML 2019; Lite: tensorflow/tpu, models/official/efficientnet/lite.
    """

    classes: int
    width: float = 1.0
    depth: float = 1.0
    stem: int = STEM
    head: int = HEAD

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks of each group."""
        first, *middle, last = (blocks for *_, blocks in GROUPS)
        return (first, *(math.ceil(self.depth * blocks) for blocks in middle), last)

    @property
    def image_normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the weights want, for pixels in 0..1."""
        return (127 / 255,) * 3, (128 / 255,) * 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        if self.width <= 0 or self.depth <= 0:
            got = f"{self.width} and {self.depth}"
            raise Refusal(message("EfficientNetLite", "width and depth > 0", got))
        x = ConvNorm(self.stem, 3, 2, name="stem")(x, train)
        groups = zip(GROUPS, self.blocks, strict=True)
        for number, ((kernel, stride, expansion, features, _), blocks) in enumerate(
            groups, start=1
        ):
            features = in_eights(self.width * features)
            x = InvertedGroup(
                features, blocks, kernel, stride, expansion, name=f"group{number}"
            )(x, train)
        x = ConvNorm(self.head, name="head")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


def efficientnet_lite0(classes: int) -> EfficientNetLite:
    """EfficientNet-Lite0 for images of 224x224, 4.652M parameters for 1000 classes."""
    return EfficientNetLite(classes)


def efficientnet_lite1(classes: int) -> EfficientNetLite:
    """EfficientNet-Lite1 for images of 240x240, 5.417M parameters for 1000 classes."""
    return EfficientNetLite(classes, 1.0, 1.1)


def efficientnet_lite2(classes: int) -> EfficientNetLite:
    """EfficientNet-Lite2 for images of 260x260, 6.092M parameters for 1000 classes."""
    return EfficientNetLite(classes, 1.1, 1.2)


def efficientnet_lite3(classes: int) -> EfficientNetLite:
    """EfficientNet-Lite3 for images of 280x280, 8.197M parameters for 1000 classes."""
    return EfficientNetLite(classes, 1.2, 1.4)


def efficientnet_lite4(classes: int) -> EfficientNetLite:
    """EfficientNet-Lite4 for images of 300x300, 13.007M parameters for 1000 classes."""
    return EfficientNetLite(classes, 1.4, 1.8)
