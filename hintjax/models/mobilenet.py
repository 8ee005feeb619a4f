"""MobileNetV3 as in torchvision: inverted bottlenecks with squeeze and excitation."""

from typing import NamedTuple, Protocol, runtime_checkable

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax.models.blocks import GlobalAveragePool
from hintjax.models.inverted import ConvNorm, InvertedBottleneck
from hintjax.models.tower import IMAGENET


@runtime_checkable
class Block(Protocol):
    """The sizes of one block, which make its module."""

    def module(self, name: str) -> nn.Module:
        """Returns the module of this name; it is called as `module(x, train)`."""
        ...


class Mobile(NamedTuple):
    """One block of MobileNetV3: see `InvertedBottleneck`.

    Attributes:
        features: number of channels of the result.
        hidden: number of channels of the depthwise convolution.
        kernel: side of its kernel.
        stride: its stride.
        hard: whether the activation is hard swish; else it is ReLU.
        squeezed: whether squeeze and excitation follow.
    """

    features: int
    hidden: int
    kernel: int
    stride: int
    hard: bool
    squeezed: bool

    def module(self, name: str) -> InvertedBottleneck:
        """Returns the block as a module of this name."""
        return InvertedBottleneck(
            self.features,
            self.hidden,
            self.kernel,
            self.stride,
            nn.hard_swish if self.hard else nn.relu,
            self.squeezed,
            symmetric=True,
            name=name,
        )


LARGE = (
    (Mobile(16, 16, 3, 1, False, False),),
    (Mobile(24, 64, 3, 2, False, False), Mobile(24, 72, 3, 1, False, False)),
    (
        Mobile(40, 72, 5, 2, False, True),
        Mobile(40, 120, 5, 1, False, True),
        Mobile(40, 120, 5, 1, False, True),
    ),
    (
        Mobile(80, 240, 3, 2, True, False),
        Mobile(80, 200, 3, 1, True, False),
        Mobile(80, 184, 3, 1, True, False),
        Mobile(80, 184, 3, 1, True, False),
    ),
    (Mobile(112, 480, 3, 1, True, True), Mobile(112, 672, 3, 1, True, True)),
    (
        Mobile(160, 672, 5, 2, True, True),
        Mobile(160, 960, 5, 1, True, True),
        Mobile(160, 960, 5, 1, True, True),
    ),
)
SMALL = (
    (Mobile(16, 16, 3, 2, False, True),),
    (Mobile(24, 72, 3, 2, False, False), Mobile(24, 88, 3, 1, False, False)),
    (
        Mobile(40, 96, 5, 2, True, True),
        Mobile(40, 240, 5, 1, True, True),
        Mobile(40, 240, 5, 1, True, True),
    ),
    (Mobile(48, 120, 5, 1, True, True), Mobile(48, 144, 5, 1, True, True)),
    (
        Mobile(96, 288, 5, 2, True, True),
        Mobile(96, 576, 5, 1, True, True),
        Mobile(96, 576, 5, 1, True, True),
    ),
)


class MobileGroup(nn.Module):
    """Blocks that come one after the other: `block1`, `block2`, ...

    Args:
        blocks: the sizes of each block.
    """

    blocks: tuple[Block, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the last block."""
        for number, block in enumerate(self.blocks, start=1):
            x = block.module(f"block{number}")(x, train)
        return x


class MobileNetV3(nn.Module):
    """MobileNetV3: a stem, groups of inverted bottlenecks, and two linear maps.

    Hint paths: `stem`, `group1`, `group2`, ... (groups of one width), `head` (a 1x1
    convolution), `pool` (the pooled vector), `hidden` (before the hard swish) and
    `classifier` (the logits). `group1/block1` ... are the blocks, and inside each block
    `expand`, `depthwise`, `squeeze`, `project` and `sum`. Torchvision's dropout is not
    here. `hintjax.weights` reads the weights of torchvision and timm, which want images
    of 224x224 in ImageNet's normalization.

    Args:
        groups: the blocks of each group.
        hidden: number of channels before the classifier.
        classes: number of logits.
        stem: number of channels of the stem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = mobilenet_v3_small(classes=10), jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)

    References:
        Howard et al., Searching for MobileNetV3, ICCV 2019; pytorch/vision,
        torchvision/models/mobilenetv3.py.
    """

    groups: tuple[tuple[Mobile, ...], ...]
    hidden: int
    classes: int
    stem: int = 16

    @property
    def image_normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the weights want, for pixels in 0..1."""
        return IMAGENET

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        hard = {"activation": nn.hard_swish, "symmetric": True}
        x = ConvNorm(self.stem, 3, 2, **hard, name="stem")(x, train)
        for number, blocks in enumerate(self.groups, start=1):
            x = MobileGroup(blocks, name=f"group{number}")(x, train)
        x = ConvNorm(6 * x.shape[-1], **hard, name="head")(x, train)
        x = nn.Dense(self.hidden, name="hidden")(GlobalAveragePool(name="pool")(x))
        return nn.Dense(self.classes, name="classifier")(nn.hard_swish(x))


def mobilenet_v3_large(classes: int) -> MobileNetV3:
    """MobileNetV3-Large, 5.483M parameters for 1000 classes."""
    return MobileNetV3(LARGE, 1280, classes)


def mobilenet_v3_small(classes: int) -> MobileNetV3:
    """MobileNetV3-Small, 2.543M parameters for 1000 classes."""
    return MobileNetV3(SMALL, 1024, classes)
