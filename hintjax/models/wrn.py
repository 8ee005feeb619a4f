"""Wide residual networks WRN-d-k for CIFAR (pre-activation blocks)."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool, batch_norm, conv


class PreactivationBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; the output is the residual sum."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the residual sum."""
        y = nn.relu(batch_norm(train, name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.features:
            # The projection takes the activated input, the identity the raw input.
            x = conv(self.features, kernel=1, stride=self.stride, name="shortcut")(y)
        y = conv(self.features, stride=self.stride, name="conv1")(y)
        y = nn.relu(batch_norm(train, name="norm2")(y))
        return x + conv(self.features, name="conv2")(y)


class Group(nn.Module):
    """Blocks of one resolution; the first block has the stride."""

    features: int
    blocks: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch h2 w2 features"]:
        """Returns the maps of the last block."""
        for number in range(1, self.blocks + 1):
            stride = self.stride if number == 1 else 1
            block = PreactivationBlock(self.features, stride, name=f"block{number}")
            x = block(x, train)
        return x


class WideResNet(nn.Module):
    """WRN-d-k: three groups of (d - 4) / 6 pre-activation blocks, k times as wide.

    Hint paths: `stem`, `group1`, `group2`, `group3` (residual sums, neither normalized
    nor activated), `pool` (the pooled vector) and `classifier` are f0 to f4 and the
    logits of the CRD benchmark code. `group1/block1`, ... are the blocks. `norm` is the
    last BatchNorm. OFD, AB and ReviewKD attach to the BatchNorms that follow a group
    (see `preactivations`). These paths also name the parameters from which OFD takes
    its margins.

    Convolutions are initialized as in the reference code (He, fan out). The
    classifier has Flax's default, where torch has U(-1, 1) / sqrt(fan in) and the
    reference code a zero bias. There is no dropout.

    Args:
        depth: d = 6n + 4.
        widen: k, the factor on the widths 16, 32, 64.
        classes: number of logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, images = WideResNet(10, 1, classes=100), jnp.zeros((2, 32, 32, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 100)

    References:
        Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016; attachment points:
        HobbitLong/RepDistiller.
    """

    depth: int
    widen: int
    classes: int

    @property
    def blocks(self) -> int:
        """Number of blocks of each group."""
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            do = "Use 10, 16, 22, 28 or 40."
            wanted = "depth to be 6n + 4 with n >= 1"
            raise Refusal(message("WideResNet", wanted, f"{self.depth}", do))
        return blocks

    @property
    def preactivations(self) -> dict[str, str]:
        """For each group, the path of its normalized output before the ReLU."""
        return {
            "group1": "group2/block1/norm1",
            "group2": "group3/block1/norm1",
            "group3": "norm",
        }

    @property
    def norms(self) -> dict[str, str]:
        """For each group, the path of the BatchNorm that OFD takes its margins from."""
        return self.preactivations

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        x = conv(16, name="stem")(x)
        for number, width in enumerate((16, 32, 64), start=1):
            stride = 1 if number == 1 else 2
            features = width * self.widen
            x = Group(features, self.blocks, stride, name=f"group{number}")(x, train)
        x = nn.relu(batch_norm(train, name="norm")(x))
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


def wrn_16_1(classes: int) -> WideResNet:
    """WRN-16-1."""
    return WideResNet(16, 1, classes)


def wrn_16_2(classes: int) -> WideResNet:
    """WRN-16-2, 0.703M parameters for 100 classes."""
    return WideResNet(16, 2, classes)


def wrn_40_1(classes: int) -> WideResNet:
    """WRN-40-1, 0.570M parameters for 100 classes."""
    return WideResNet(40, 1, classes)


def wrn_40_2(classes: int) -> WideResNet:
    """WRN-40-2, 2.255M parameters for 100 classes."""
    return WideResNet(40, 2, classes)
