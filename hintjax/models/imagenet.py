"""ImageNet ResNets as in torchvision: teachers with imported weights."""

import math

from flax import linen as nn
from jax import Array, lax
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool, Sum, batch_norm, conv
from hintjax.models.resnet import BasicBlock, Group, Stem

WIDTHS = (64, 64, 128, 256, 512)
EXPANSION = 4  # channels of a bottleneck, divided by channels of its 3x3 convolution


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; its layer `sum` is the map before the ReLU.

    The 3x3 convolution has the stride (v1.5); in the paper the first 1x1 has it.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 wide"]:
        """Returns the maps after the last ReLU."""
        wide = EXPANSION * self.features
        y = conv(self.features, kernel=1, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.features, stride=self.stride, name="conv2")(y)
        y = nn.relu(batch_norm(train, name="norm2")(y))
        y = conv(wide, kernel=1, name="conv3")(y)
        y = batch_norm(train, name="norm3")(y)
        if self.stride != 1 or x.shape[-1] != wide:
            x = conv(wide, kernel=1, stride=self.stride, name="shortcut_conv")(x)
            x = batch_norm(train, name="shortcut_norm")(x)
        return nn.relu(Sum(name="sum")(x, y))


class MaxPool(nn.Module):
    """3x3 max pooling at stride 2, padded by one pixel on every side, as in torch."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h2 w2 channels"]:
        """Returns the pooled maps."""
        sides = ((1, 1), (1, 1))
        return nn.pool(x, -math.inf, lax.max, (3, 3), (2, 2), sides)


class ImageNetResNet(nn.Module):
    """ImageNet ResNet: a 7x7 stem, max pooling and four groups.

    Hint paths: `stem` (after the ReLU), `maxpool`, `group1` ... `group4` (after the
    ReLU; torchvision's layer1 ... layer4), `pool` (the pooled vector) and `classifier`
    (the logits). `group1/block1` ... are the blocks. `group1/block{n}/sum` of the last
    block is `group1` before its ReLU; OFD, AB and ReviewKD attach there (see
    `preactivations`). OFD takes its margins from the last BatchNorm of the group's last
    block (see `norms`).

    Convolutions are initialized as in torchvision (He, fan out). The classifier
    has Flax's default. `hintjax.weights` reads the weights of torchvision and timm.

    Args:
        blocks: number of blocks of each of the four groups.
        classes: number of logits.
        block: `BasicBlock`, or `Bottleneck`, whose maps have four times the channels.
        widths: channels of the stem and of the 3x3 convolutions of the four groups.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = imagenet_resnet18(classes=10), jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)
        >>> model.preactivations["group4"]
        'group4/block2/sum'

    References:
        He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016;
        pytorch/vision, torchvision/models/resnet.py.
    """

    blocks: tuple[int, ...]
    classes: int
    block: type[nn.Module] = BasicBlock
    widths: tuple[int, ...] = WIDTHS

    @property
    def preactivations(self) -> dict[str, str]:
        """For each group, the path of its output before the last ReLU."""
        return {group: f"{block}/sum" for group, block in self._last_blocks()}

    @property
    def norms(self) -> dict[str, str]:
        """For each group, the path of the BatchNorm that OFD takes its margins from."""
        last = "norm3" if self.block is Bottleneck else "norm2"
        return {group: f"{block}/{last}" for group, block in self._last_blocks()}

    def _last_blocks(self):
        for number, blocks in enumerate(self.blocks, start=1):
            yield f"group{number}", f"group{number}/block{blocks}"

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        stem, *groups = self.widths
        if len(groups) != len(self.blocks):
            wanted = f"a width for the stem and for each of {len(self.blocks)} groups"
            raise Refusal(message("ImageNetResNet", wanted, f"{self.widths}"))
        x = Stem(stem, kernel=7, stride=2, name="stem")(x, train)
        x = MaxPool(name="maxpool")(x)
        for number, (features, blocks) in enumerate(
            zip(groups, self.blocks, strict=True), start=1
        ):
            stride = 1 if number == 1 else 2
            name = f"group{number}"
            x = Group(features, blocks, stride, self.block, name=name)(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


def imagenet_resnet18(classes: int) -> ImageNetResNet:
    """ResNet-18, 11.690M parameters for 1000 classes."""
    return ImageNetResNet((2, 2, 2, 2), classes)


def imagenet_resnet34(classes: int) -> ImageNetResNet:
    """ResNet-34, 21.798M parameters for 1000 classes."""
    return ImageNetResNet((3, 4, 6, 3), classes)


def imagenet_resnet50(classes: int) -> ImageNetResNet:
    """ResNet-50, 25.557M parameters for 1000 classes."""
    return ImageNetResNet((3, 4, 6, 3), classes, Bottleneck)
