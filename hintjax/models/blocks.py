"""Small named modules that the residual families share."""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class GlobalAveragePool(nn.Module):
    """Mean over the map; a module, so that the pooled vector can be a hint."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch channels"]:
        """Returns the mean over height and width."""
        return x.mean(axis=(-3, -2))


class Sum(nn.Module):
    """Addition; a module, so that a residual sum can be a hint before its ReLU."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*shape"], y: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """Returns x + y."""
        return x + y


def conv(features: int, *, name: str, kernel: int = 3, stride: int = 1) -> nn.Conv:
    """A convolution without bias, padded by `kernel // 2` on every side.

    At stride 2 on an even map, "SAME" pads (0, 1) and torch pads (1, 1). The shapes
    are the same, but with "SAME" every output is computed one pixel further along the
    map, and imported teachers would give wrong results.
    """
    side = (kernel // 2, kernel // 2)
    return nn.Conv(
        features,
        kernel_size=(kernel, kernel),
        strides=(stride, stride),
        padding=(side, side),
        use_bias=False,
        kernel_init=HE_FAN_OUT,
        name=name,
    )


def batch_norm(
    train: bool, *, name: str, momentum: float = 0.9, epsilon: float = 1e-5
) -> nn.BatchNorm:
    """BatchNorm with torch's constants by default (its momentum 0.1 is 0.9 here).

    The variance is computed the slow, exact way: E[x^2] - E[x]^2 cancels when the mean
    is large. The running variance is biased, as in Flax; torch stores n / (n - 1)
    times this value.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        use_fast_variance=False,
        name=name,
    )
