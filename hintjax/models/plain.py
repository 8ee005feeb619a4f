"""Plain CNNs: no residual connections, no BatchNorm.

Hints were invented for deep and thin students: with backpropagation alone they often
stay at chance level. Shallow and wide plain CNNs are good teachers.
"""

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from hintjax._checks import Refusal, message
from hintjax.models.blocks import GlobalAveragePool

LECUN = nn.initializers.lecun_normal()  # Flax's own default


class ConvRelu(nn.Module):
    """A 3x3 convolution and ReLU; its layer `conv` is the map before the ReLU."""

    features: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h w features"]:
        """Returns the maps after the ReLU."""
        x = nn.Conv(
            self.features,
            kernel_size=(3, 3),
            padding="SAME",
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        return nn.relu(x)


class MaxPool(nn.Module):
    """2x2 max pooling at stride 2; a module, so that its output can be a hint."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"]
    ) -> Float[Array, "*batch h2 w2 channels"]:
        """Returns the pooled maps."""
        return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))


class PlainCNN(nn.Module):
    """3x3 convolutions with ReLU, global average pooling, and a linear classifier.

    Hint paths: `conv1`, `conv2`, ... (after the ReLU), `conv1/conv`, ... (before it),
    `maxpool2` (the pooling that follows `conv2`), `pool` (the pooled vector) and
    `classifier` (the logits).

    Args:
        widths: channels of each convolution; one entry per convolution.
        classes: number of logits.
        pools: the convolutions, counted from 1, that a 2x2 max pooling follows.
        kernel_init: initializer of the convolutions' kernels. The default is Flax's
            own; `nn.initializers.he_normal()` makes deep networks trainable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = PlainCNN(widths=(8, 8, 16), classes=10, pools=(2,))
        >>> images = jnp.zeros((2, 8, 8, 1))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> jax.eval_shape(model.apply, variables, images).shape
        (2, 10)
    """

    widths: tuple[int, ...]
    classes: int
    pools: tuple[int, ...] = ()
    kernel_init: nn.initializers.Initializer = LECUN

    @property
    def preactivations(self) -> dict[str, str]:
        """For each convolution, the path of its output before the ReLU."""
        numbers = range(1, len(self.widths) + 1)
        return {f"conv{number}": f"conv{number}/conv" for number in numbers}

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch h w channels"], train: bool = False
    ) -> Float[Array, "*batch classes"]:
        """Returns the logits of a batch of images."""
        outside = set(self.pools) - set(range(1, len(self.widths) + 1))
        if outside:
            wanted = f"pools among the convolutions 1 to {len(self.widths)}"
            do = "Count the convolutions from 1."
            raise Refusal(message("PlainCNN", wanted, f"{sorted(outside)}", do))
        for number, width in enumerate(self.widths, start=1):
            x = ConvRelu(width, self.kernel_init, name=f"conv{number}")(x)
            if number in self.pools:
                x = MaxPool(name=f"maxpool{number}")(x)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


def plain_thin(
    classes: int,
    depth: int = 20,
    width: int = 8,
    kernel_init: nn.initializers.Initializer = LECUN,
) -> PlainCNN:
    """A thin, deep student; by default 11,266 parameters for 10 classes and gray input.

    >>> plain_thin(classes=10, depth=3).widths
    (8, 8, 8)
    """
    return PlainCNN((width,) * depth, classes, kernel_init=kernel_init)


def plain_thin_he(classes: int) -> PlainCNN:
    """`plain_thin` with He's initialization, which lets it train without hints.

    References:
        He et al. 2015, Delving Deep into Rectifiers.
    """
    return plain_thin(classes, kernel_init=nn.initializers.he_normal())


def plain_wide(
    classes: int,
    kernel_init: nn.initializers.Initializer = LECUN,
) -> PlainCNN:
    """A wide teacher, 64-64-pool-128: 112,714 parameters for 10 classes, gray input.

    >>> plain_wide(classes=10).widths
    (64, 64, 128)
    """
    return PlainCNN((64, 64, 128), classes, pools=(2,), kernel_init=kernel_init)
