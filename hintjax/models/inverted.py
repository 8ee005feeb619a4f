"""Inverted bottlenecks: narrow maps, wide depthwise convolutions between them."""

from collections.abc import Callable

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax.models.blocks import HE_FAN_OUT, Sum, batch_norm

HE_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
Activation = Callable[[Array], Array]


class ConvNorm(nn.Module):
    """Convolution and BatchNorm, then an activation.

    Args:
        features: number of channels of the result.
        kernel: side of the kernel.
        stride: stride along both axes.
        depthwise: whether every channel has a kernel of its own.
        activation: the activation; None for none.
        symmetric: whether the padding is torch's, the same on both sides. If it is
            TensorFlow's, stride 2 on an even map pads (0, 1) for 3x3 and (1, 2) for
            5x5.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: Activation | None = nn.relu6
    symmetric: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps after BatchNorm, or after the activation."""
        side = (self.kernel // 2, self.kernel // 2)
        x = nn.Conv(
            self.features,
            kernel_size=(self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=(side, side) if self.symmetric else "SAME",
            feature_group_count=x.shape[-1] if self.depthwise else 1,
            use_bias=False,
            kernel_init=HE_DEPTHWISE if self.depthwise else HE_FAN_OUT,
            name="conv",
        )(x)
        x = batch_norm(train, name="norm", momentum=0.99, epsilon=1e-3)(x)
        return x if self.activation is None else self.activation(x)


class SqueezeExcite(nn.Module):
    """Factors for the channels, from their means: squeeze and excitation.

    Its layers are `reduce` (before a ReLU) and `expand` (before a hard sigmoid).

    Args:
        hidden: number of channels between both linear maps.
    """

    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h w channels"]:
        """Returns the scaled maps."""
        y = x.mean(axis=(-3, -2), keepdims=True)
        y = nn.relu(nn.Conv(self.hidden, (1, 1), name="reduce")(y))
        y = nn.Conv(x.shape[-1], (1, 1), name="expand")(y)
        return x * nn.hard_sigmoid(y)


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution and projection, each with BatchNorm.

    The layers are `start` (if a depthwise convolution comes before the expansion),
    `expand` (absent if there is nothing to expand before `depthwise`), `depthwise` (if
    it has a kernel), `squeeze` (if there is squeeze and excitation) and `project`, and
    `sum` if the block keeps the shape. No activation follows `start` and `project`.

    With `start` this is the universal inverted bottleneck of MobileNetV4, and with a
    larger kernel of `expand`, and without depthwise convolutions, the fused one.

    Args:
        features: number of channels of the result.
        hidden: number of channels after the expansion.
        kernel: side of the kernel of `depthwise`; 0 for no such convolution.
        stride: the stride of `depthwise`, or else of `start`, or else of `expand`.
        activation: the activation after the expansion and the depthwise convolution.
        squeezed: whether squeeze and excitation follow the depthwise convolution.
        symmetric: whether the padding is torch's.
        start_kernel: side of the kernel of `start`; 0 for no such convolution.
        expand_kernel: side of the kernel of `expand`.
    """

    features: int
    hidden: int
    kernel: int = 3
    stride: int = 1
    activation: Activation = nn.relu6
    squeezed: bool = False
    symmetric: bool = False
    start_kernel: int = 0
    expand_kernel: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the projected maps, plus the input if the shape is the same."""
        active = {"activation": self.activation, "symmetric": self.symmetric}
        left = 1 if self.kernel else self.stride  # for layers before `depthwise`
        y = x
        if self.start_kernel:
            start = x.shape[-1], self.start_kernel, left, True
            y = ConvNorm(*start, None, self.symmetric, name="start")(y, train)
            left = 1
        if self.hidden != x.shape[-1] or not self.kernel:
            expand = self.hidden, self.expand_kernel, left
            y = ConvNorm(*expand, **active, name="expand")(y, train)
        if self.kernel:
            depthwise = self.hidden, self.kernel, self.stride, True
            y = ConvNorm(*depthwise, **active, name="depthwise")(y, train)
        if self.squeezed:
            y = SqueezeExcite(in_eights(float(self.hidden // 4)), name="squeeze")(y)
        y = ConvNorm(self.features, activation=None, name="project")(y, train)
        return Sum(name="sum")(x, y) if x.shape == y.shape else y


def in_eights(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and at least 90 % of the channels.

    >>> [in_eights(n) for n in (3.0, 17.6, 26.4, 19.0)]
    [8, 16, 24, 24]
    """
    found = max(8, int(channels + 4) // 8 * 8)
    return found if found >= 0.9 * channels else found + 8
