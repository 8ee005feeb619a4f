"""CIFAR ResNets of depth 6n + 2, narrow (16, 16, 32, 64) and four times as wide."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool, Sum, batch_norm, conv

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)
GROUPS = ("group1", "group2", "group3")


class Stem(nn.Module):
    """Convolution, BatchNorm and ReLU, applied to the image."""

    features: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps after the ReLU."""
        x = conv(self.features, kernel=self.kernel, stride=self.stride, name="conv")(x)
        return nn.relu(batch_norm(train, name="norm")(x))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; its layer `sum` is the map before the ReLU."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps after the last ReLU."""
        y = conv(self.features, stride=self.stride, name="conv1")(x)
        y = nn.relu(batch_norm(train, name="norm1")(y))
        y = conv(self.features, name="conv2")(y)
        y = batch_norm(train, name="norm2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, kernel=1, stride=self.stride, name="shortcut_conv")(
                x
            )
            x = batch_norm(train, name="shortcut_norm")(x)
        return nn.relu(Sum(name="sum")(x, y))


class Group(nn.Module):
    """Blocks of one resolution; the first block has the stride."""

    features: int
    blocks: int
    stride: int
    block: type[nn.Module] = BasicBlock

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the last block."""
        for number in range(1, self.blocks + 1):
            stride = self.stride if number == 1 else 1
            x = self.block(self.features, stride, name=f"block{number}")(x, train)
        return x


class ResNet(nn.Module):
    """CIFAR ResNet with basic blocks.

    Hint paths, with n = (depth - 2) / 6: `stem`, `group1`, `group2`, `group3` (after
    the ReLU), `pool` (the pooled vector) and `classifier` are f0 to f4 and the logits
    of the CRD benchmark code. `group1/block1` ... `group3/block{n}` are the blocks.
    `group1/block{n}/sum` is `group1` before its ReLU; OFD, AB and ReviewKD attach there
    (see `preactivations`). OFD takes its margins from the BatchNorm
    `group1/block{n}/norm2` (see `norms`).

    Convolutions are initialized as in the reference code (He, fan out). The
    classifier has Flax's default, where torch has U(-1, 1) / sqrt(fan in).

    Args:
        depth: 6n + 2.
        widths: channels of the stem and of the three groups.
        classes: number of logits.
        stride: stride of the stem, 1 in the reference code. With 2, all maps have half
            of the side, so that the network takes about a quarter of the operations.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = resnet8(classes=100), jnp.zeros((2, 32, 32, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 100)
        >>> model.preactivations["group3"]
        'group3/block1/sum'

    References:
        He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016;
        widths and attachment points: HobbitLong/RepDistiller.
    """

    depth: int
    widths: tuple[int, int, int, int]
    classes: int
    stride: int = 1

    @property
    def blocks(self) -> int:
        """Number of blocks of each group."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            do = "Use 8, 14, 20, 32, 44, 56 or 110."
            wanted = "depth to be 6n + 2 with n >= 1"
            raise Refusal(message("ResNet", wanted, f"{self.depth}", do))
        return blocks

    @property
    def preactivations(self) -> dict[str, str]:
        """For each group, the path of its output before the last ReLU."""
        return {group: f"{group}/block{self.blocks}/sum" for group in GROUPS}

    @property
    def norms(self) -> dict[str, str]:
        """For each group, the path of the BatchNorm that OFD takes its margins from."""
        return {group: f"{group}/block{self.blocks}/norm2" for group in GROUPS}

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        stem, *groups = self.widths
        x = Stem(stem, stride=self.stride, name="stem")(x, train)
        for number, features in enumerate(groups, start=1):
            stride = 1 if number == 1 else 2
            x = Group(features, self.blocks, stride, name=f"group{number}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


def resnet8(classes: int) -> ResNet:
    """ResNet-8: 1 block in each group."""
    return ResNet(8, NARROW, classes)


def resnet14(classes: int) -> ResNet:
    """ResNet-14: 2 blocks in each group."""
    return ResNet(14, NARROW, classes)


def resnet20(classes: int) -> ResNet:
    """ResNet-20: 3 blocks in each group, 0.278M parameters for 100 classes."""
    return ResNet(20, NARROW, classes)


def resnet32(classes: int) -> ResNet:
    """ResNet-32: 5 blocks in each group, 0.473M parameters for 100 classes."""
    return ResNet(32, NARROW, classes)


def resnet44(classes: int) -> ResNet:
    """ResNet-44: 7 blocks in each group."""
    return ResNet(44, NARROW, classes)


def resnet56(classes: int) -> ResNet:
    """ResNet-56: 9 blocks in each group, 0.862M parameters for 100 classes."""
    return ResNet(56, NARROW, classes)


def resnet110(classes: int) -> ResNet:
    """ResNet-110: 18 blocks in each group, 1.737M parameters for 100 classes."""
    return ResNet(110, NARROW, classes)


def resnet8x4(classes: int) -> ResNet:
    """ResNet-8 four times as wide, 1.234M parameters for 100 classes."""
    return ResNet(8, WIDE, classes)


def resnet32x4(classes: int) -> ResNet:
    """ResNet-32 four times as wide, 7.434M parameters for 100 classes."""
    return ResNet(32, WIDE, classes)
