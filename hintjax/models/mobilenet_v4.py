"""MobileNetV4 of convolutions alone, as in timm: universal inverted bottlenecks."""

from typing import NamedTuple

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax.models.blocks import GlobalAveragePool, batch_norm
from hintjax.models.inverted import ConvNorm, InvertedBottleneck
from hintjax.models.mobilenet import Block, MobileGroup
from hintjax.models.tower import IMAGENET

HEAD, HIDDEN = 960, 1280  # channels before and after the pooling, in every size


class Universal(NamedTuple):
    """A universal inverted bottleneck: see `InvertedBottleneck`.

    The paper's four kinds differ in their depthwise convolutions: ExtraDW has both,
    ConvNext `start` alone, IB `depthwise` alone, and FFN none. Its fused inverted
    bottleneck has none either, but an expansion of 3x3.

    Attributes:
        features: number of channels of the result.
        hidden: number of channels after the expansion.
        start: side of the kernel before the expansion; 0 for no such convolution.
        kernel: side of the kernel after the expansion; 0 for no such convolution.
        stride: the stride of the block.
        expand: side of the kernel of the expansion.
    """

    features: int
    hidden: int
    start: int
    kernel: int
    stride: int = 1
    expand: int = 1

    def module(self, name: str) -> InvertedBottleneck:
        """Returns the block as a module of this name."""
        return InvertedBottleneck(
            self.features,
            self.hidden,
            self.kernel,
            self.stride,
            nn.relu,
            symmetric=True,
            start_kernel=self.start,
            expand_kernel=self.expand,
            name=name,
        )


class Plain(NamedTuple):
    """A convolution, BatchNorm and ReLU.

    Attributes:
        features: number of channels of the result.
        kernel: side of the kernel.
        stride: the stride.
    """

    features: int
    kernel: int = 1
    stride: int = 1

    def module(self, name: str) -> ConvNorm:
        """Returns the block as a module of this name."""
        return ConvNorm(
            self.features,
            self.kernel,
            self.stride,
            activation=nn.relu,
            symmetric=True,
            name=name,
        )


SMALL = (
    (Plain(32, 3, 2), Plain(32)),
    (Plain(96, 3, 2), Plain(64)),
    (
        Universal(96, 192, 5, 5, 2),
        *(Universal(96, 192, 0, 3),) * 4,
        Universal(96, 384, 3, 0),
    ),
    (
        Universal(128, 576, 3, 3, 2),
        Universal(128, 512, 5, 5),
        Universal(128, 512, 0, 5),
        Universal(128, 384, 0, 5),
        *(Universal(128, 512, 0, 3),) * 2,
    ),
)
MEDIUM = (
    (Universal(48, 128, 0, 0, 2, expand=3),),
    (Universal(80, 192, 3, 5, 2), Universal(80, 160, 3, 3)),
    (
        Universal(160, 480, 3, 5, 2),
        *(Universal(160, 640, 3, 3),) * 2,
        Universal(160, 640, 3, 5),
        Universal(160, 640, 3, 3),
        Universal(160, 640, 3, 0),
        Universal(160, 320, 0, 0),
        Universal(160, 640, 3, 0),
    ),
    (
        Universal(256, 960, 5, 5, 2),
        Universal(256, 1024, 5, 5),
        *(Universal(256, 1024, 3, 5),) * 2,
        Universal(256, 1024, 0, 0),
        Universal(256, 1024, 3, 0),
        Universal(256, 512, 3, 5),
        Universal(256, 1024, 5, 5),
        *(Universal(256, 1024, 0, 0),) * 2,
        Universal(256, 512, 5, 0),
    ),
)
LARGE = (
    (Universal(48, 96, 0, 0, 2, expand=3),),
    (Universal(96, 192, 3, 5, 2), Universal(96, 384, 3, 3)),
    (
        Universal(192, 384, 3, 5, 2),
        *(Universal(192, 768, 3, 3),) * 3,
        Universal(192, 768, 3, 5),
        *(Universal(192, 768, 5, 3),) * 5,
        Universal(192, 768, 3, 0),
    ),
    (
        Universal(512, 768, 5, 5, 2),
        *(Universal(512, 2048, 5, 5),) * 3,
        Universal(512, 2048, 5, 0),
        Universal(512, 2048, 5, 3),
        *(Universal(512, 2048, 5, 0),) * 2,
        Universal(512, 2048, 5, 3),
        Universal(512, 2048, 5, 5),
        *(Universal(512, 2048, 5, 0),) * 3,
    ),
)


class MobileNetV4(nn.Module):
    """MobileNetV4-Conv: a stem, four groups of blocks, and two linear maps.

    Hint paths: `stem`, `group1` ... `group4` (their maps are 1/4, 1/8, 1/16 and 1/32 of
    the image), `head` (a 1x1 convolution), `pool` (the pooled vector), `hidden` and
    `norm` (before the ReLU) and `classifier` (the logits). `group1/block1` ... are the
    blocks, and inside a universal inverted bottleneck `start`, `expand`, `depthwise`
    (each where the block has it), `project` and `sum`. Timm's dropout and stochastic
    depth are not here.

    `hintjax.weights` reads the weights of timm: of mobilenetv4_conv_small,
    mobilenetv4_conv_medium and mobilenetv4_conv_large. They want images in ImageNet's
    normalization; mobilenetv4_conv_small.e3600_r256_in1k alone wants pixels in -1..1.
    The variants with attention (hybrid) and with smoothing before a stride (aa, blur)
    are not covered. A file with smoothing has the names of a file without it, and so it
    is not refused, but the model computes other numbers.

    Args:
        groups: the blocks of each group.
        classes: number of logits.
        stem: number of channels of the stem.
        head: number of channels before the pooling.
        hidden: number of channels before the classifier.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = mobilenet_v4_conv_small(classes=10)
        >>> images = jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)

    References:
        Qin et al., MobileNetV4 - Universal Models for the Mobile Ecosystem, ECCV 2024,
        arXiv 2404.10518; huggingface/pytorch-image-models, timm/models/mobilenetv3.py.
    """

    groups: tuple[tuple[Block, ...], ...]
    classes: int
    stem: int = 32
    head: int = HEAD
    hidden: int = HIDDEN

    @property
    def image_normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the weights want, for pixels in 0..1."""
        return IMAGENET

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        x = Plain(self.stem, 3, 2).module("stem")(x, train)
        for number, blocks in enumerate(self.groups, start=1):
            x = MobileGroup(blocks, name=f"group{number}")(x, train)
        x = GlobalAveragePool(name="pool")(Plain(self.head).module("head")(x, train))
        x = nn.Dense(self.hidden, use_bias=False, name="hidden")(x)
        x = batch_norm(train, name="norm", momentum=0.99, epsilon=1e-3)(x)
        return nn.Dense(self.classes, name="classifier")(nn.relu(x))


def mobilenet_v4_conv_small(classes: int) -> MobileNetV4:
    """MobileNetV4-Conv-S for images of 224x224, 3.774M parameters for 1000 classes."""
    return MobileNetV4(SMALL, classes)


def mobilenet_v4_conv_medium(classes: int) -> MobileNetV4:
    """MobileNetV4-Conv-M for images of 256x256, 9.716M parameters for 1000 classes."""
    return MobileNetV4(MEDIUM, classes)


def mobilenet_v4_conv_large(classes: int) -> MobileNetV4:
    """MobileNetV4-Conv-L for images of 384x384, 32.591M parameters for 1000 classes."""
    return MobileNetV4(LARGE, classes, stem=24)
