"""Networks for devices, of the benchmarks `edge_table` and `foundation`.

    PYTHONPATH=benchmarks hintjax distill --student edge_networks:thin ...

The first convolution already halves the maps, so that later layers have little to
compute.
"""

from typing import NamedTuple

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax.models.resnet import ResNet


class Conv(NamedTuple):
    """Channels, side of the kernel, and stride of a convolution."""

    channels: int
    kernel: int = 3
    stride: int = 1


class ConvRelu(nn.Module):
    """A convolution and ReLU."""

    conv: Conv

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Returns the maps after the ReLU."""
        channels, kernel, stride = self.conv
        he = nn.initializers.he_normal()
        sides, strides = (kernel, kernel), (stride, stride)
        return nn.relu(
            nn.Conv(channels, sides, strides, kernel_init=he, name="conv")(x)
        )


class Strided(nn.Module):
    """Convolutions with ReLU, global average pooling, and a linear classifier.

    Hint paths: `conv1`, `conv2`, ... (after the ReLU) and `classifier` (the logits).
    """

    convs: tuple[Conv, ...]
    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns the logits of a batch of images."""
        for number, conv in enumerate(self.convs, start=1):
            x = ConvRelu(conv, name=f"conv{number}")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


def teacher(classes: int) -> Strided:
    """Four convolutions of 32 to 128 channels; 242,058 parameters for gray images."""
    convs = (Conv(32, 5, 2), Conv(64, 3, 2), Conv(128), Conv(128, 3, 2))
    return Strided(convs, classes)


def half(classes: int) -> Strided:
    """The teacher with half of its channels; 61,930 parameters for color images."""
    convs = (Conv(16, 5, 2), Conv(32, 3, 2), Conv(64), Conv(64, 3, 2))
    return Strided(convs, classes)


def thin(classes: int) -> Strided:
    """Three thin convolutions; 19,418 parameters for gray images."""
    return Strided((Conv(16, 5, 2), Conv(32, 3, 2), Conv(48)), classes)


def resnet8(classes: int) -> ResNet:
    """ResNet-8 whose stem halves the maps; 174,274 parameters for color images."""
    return ResNet(8, (24, 24, 48, 96), classes, stride=2)
