"""The maxout teachers and the thin, deep students of FitNets.

Sources: the configuration files of the FitNets code (FitNet 4, MNIST student) and of
the maxout code in pylearn2 (both teachers). FitNets 1 to 3 have no published
configuration file; their widths come from copies of the paper's table.

Uncertain points:
* The paper's parameter figures. It gives about 250K, 862K, 1.6M and 2.5M for FitNets 1
  to 4 and 9M for the CIFAR teacher. With the 500 hidden units of 5 pieces of the
  configuration files, the counts here are 0.35M, 1.06M, 1.70M, 2.74M and 16.25M. With 2
  pieces in this layer (`hidden_pieces=2`), all counts except FitNet 3's are within 2%
  of the paper's.
* The pieces of the last MNIST convolutions. The configuration files have 4; 2 pieces,
  the default here, give the paper's 30K and 361K parameters.
* The biases: one per channel here, one per position in the MNIST files.

The authors also trained with dropout (teachers), limits on kernel norms, and a factor
0.05 on the convolutions' learning rate. These are not part of the modules.
"""

import math
from typing import NamedTuple

from flax import linen as nn
from jax import Array, lax
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.maxout import Maxout, symmetric_uniform


class Layer(NamedTuple):
    """One maxout convolution and the max pooling that follows it."""

    features: int
    kernel: int = 3
    padding: int = 1
    window: int = 1  # of the pooling; 1 for none
    stride: int = 1  # of the pooling
    pieces: int = 2


def max_pool(
    x: Float[Array, "*batch h w channels"], window: int, stride: int
) -> Float[Array, "*batch h2 w2 channels"]:
    """Max pooling that covers the whole map, as in pylearn2: sizes are rounded up.

    A window that is larger than the map is cut to the map.

    Args:
        x: maps.
        window: side of the window, in pixels.
        stride: step of the window, in pixels.

    Returns:
        Maps of side `ceil((side - window) / stride) + 1`.

    Example:
        >>> import jax.numpy as jnp
        >>> max_pool(jnp.zeros((1, 33, 33, 2)), window=4, stride=2).shape
        (1, 16, 16, 2)
    """
    sides = x.shape[-3:-1]
    windows = tuple(min(window, side) for side in sides)
    padding = tuple(
        (0, (w - side) % stride) for side, w in zip(sides, windows, strict=True)
    )
    return nn.pool(x, -math.inf, lax.max, windows, (stride, stride), padding)


class MaxoutConv(nn.Module):
    """Convolution, maxout and max pooling; FitNets counts them as one layer."""

    layer: Layer
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps after convolution, maxout and pooling."""
        layer = self.layer
        if min(x.shape[-3:-1]) + 2 * layer.padding < layer.kernel:
            least = layer.kernel - 2 * layer.padding
            wanted = f"a map of at least {least} pixels per side"
            got = f"{x.shape[-3]}x{x.shape[-2]}"
            do = "Use larger images or another model."
            raise Refusal(message(f"{self.name}", wanted, got, do))
        side = (layer.padding, layer.padding)
        x = nn.Conv(
            layer.features * layer.pieces,
            kernel_size=(layer.kernel, layer.kernel),
            padding=(side, side),
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        x = Maxout(layer.pieces, name="maxout")(x)
        return max_pool(x, layer.window, layer.stride)


class MaxoutDense(nn.Module):
    """A fully connected maxout layer."""

    features: int
    pieces: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"]
    ) -> Float[Array, "*batch features"]:
        """Returns the units of the layer."""
        x = nn.Dense(
            self.features * self.pieces, kernel_init=self.kernel_init, name="dense"
        )(x)
        return Maxout(self.pieces, name="maxout")(x)


class MaxoutCNN(nn.Module):
    """Maxout convolutions, a fully connected maxout layer, a linear classifier.

    Hint paths: `conv1`, `conv2`, ... (after maxout and pooling), `conv1/maxout`, ...
    (before pooling), `conv1/conv`, ... (the linear pieces), `hidden`, `classifier`.
    `conv1`, `conv2`, ... are the layers that FitNets counts: its pair "student 11th,
    teacher 2nd" is `("conv11", "conv2")`.

    Args:
        layers: the convolutions.
        classes: number of logits.
        hidden: units of the fully connected layer, 0 for none.
        hidden_pieces: pieces of the fully connected layer.
        kernel_init: initializer of all kernels; U(-0.005, 0.005) as in the paper.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = fitnet1(classes=10), jnp.zeros((2, 32, 32, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)

    References:
        Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep
        Nets, ICLR 2015 (code: adri-romsor/FitNets). Goodfellow et al., Maxout Networks,
        ICML 2013 (code: lisa-lab/pylearn2).
    """

    layers: tuple[Layer, ...]
    classes: int
    hidden: int = 500
    hidden_pieces: int = 5
    kernel_init: nn.initializers.Initializer = symmetric_uniform(0.005)

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        for number, layer in enumerate(self.layers, start=1):
            x = MaxoutConv(layer, self.kernel_init, name=f"conv{number}")(x)
        x = x.reshape(*x.shape[:-3], -1)
        init = self.kernel_init
        if self.hidden:
            x = MaxoutDense(self.hidden, self.hidden_pieces, init, name="hidden")(x)
        return nn.Dense(self.classes, kernel_init=init, name="classifier")(x)


def fitnet(widths: tuple[tuple[int, ...], ...], classes: int) -> MaxoutCNN:
    """A thin, deep CIFAR student from the widths of its three groups.

    A 2x2 pooling ends each of the first two groups. An 8x8 pooling ends the last group;
    it covers the whole map of a 32x32 image.

    >>> len(fitnet(((16, 16), (32, 32), (64, 64)), classes=10).layers)
    6
    """
    layers = []
    for group, window, stride in zip(widths, (2, 2, 8), (2, 2, 1), strict=True):
        layers += [Layer(width) for width in group[:-1]]
        layers += [Layer(group[-1], window=window, stride=stride)]
    return MaxoutCNN(tuple(layers), classes)


def fitnet1(classes: int) -> MaxoutCNN:
    """FitNet 1, 11 layers; the paper guides `conv6` by the teacher's `conv2`."""
    return fitnet(((16,) * 3, (32,) * 3, (48, 48, 64)), classes)


def fitnet2(classes: int) -> MaxoutCNN:
    """FitNet 2, 11 layers; the paper guides `conv6` by the teacher's `conv2`."""
    return fitnet(((16, 32, 32), (48, 64, 80), (96, 96, 128)), classes)


def fitnet3(classes: int) -> MaxoutCNN:
    """FitNet 3, 13 layers; the paper guides `conv8` by the teacher's `conv2`."""
    return fitnet(((32, 48, 64, 64), (80,) * 4, (128,) * 3), classes)


def fitnet4(classes: int) -> MaxoutCNN:
    """FitNet 4, 19 layers; the paper guides `conv11` by the teacher's `conv2`."""
    return fitnet(((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6), classes)


def maxout_cifar(classes: int) -> MaxoutCNN:
    """The CIFAR teacher of FitNets, 96-192-192 and 500 hidden units."""
    layers = (
        Layer(96, kernel=8, padding=4, window=4, stride=2),
        Layer(192, kernel=8, padding=3, window=4, stride=2),
        Layer(192, kernel=5, padding=3, window=2, stride=2),
    )
    return MaxoutCNN(layers, classes)


def fitnet_mnist(classes: int) -> MaxoutCNN:
    """The MNIST student, 6 convolutions; the teacher's `conv2` guides `conv4`."""
    layers = (
        Layer(16, kernel=5, padding=0),
        Layer(16, padding=0, window=4, stride=2),
        Layer(16, kernel=5, padding=3),
        Layer(16, padding=0, window=4, stride=2),
        Layer(12, padding=3),
        Layer(12, padding=0, window=2, stride=2),
    )
    return MaxoutCNN(layers, classes, hidden=0)


def maxout_mnist(classes: int) -> MaxoutCNN:
    """The MNIST teacher of FitNets, 48-48-24."""
    layers = (
        Layer(48, kernel=8, padding=0, window=4, stride=2),
        Layer(48, kernel=8, padding=3, window=4, stride=2),
        Layer(24, kernel=5, padding=3, window=2, stride=2),
    )
    return MaxoutCNN(layers, classes, hidden=0)
