"""The modules that are trained beside the student."""

from collections.abc import Callable

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Key, PyTree

from hintjax._numerics import (
    adaptive_average_pool,
    bilinear_resize,
    nearest_resize,
    unit,
)
from hintjax.regressors.grids import to_grid, to_tokens

Shape = tuple[int, ...]
Sizing = Callable[[Shape, Shape], nn.Module]


def batch_norm(train: bool, name: str | None = None) -> nn.BatchNorm:
    """The BatchNorm of every regressor, with torch's constants.

    Torch's momentum of 0.1 is called 0.9 in Flax. The variance is computed in two
    passes, because E[x^2] - E[x]^2 cancels for large means.

    The running variance differs from torch's. Flax averages the biased variance of a
    batch; torch averages n / (n - 1) times it, where n counts the examples and
    positions of one channel. The largest measured difference is 4.4e-2 of the running
    variance, at 1x1 maps of a batch of 3; large maps differ far less. Training uses
    the variance of the batch, and is not affected.

    Args:
        train: use the batch's statistics instead of the running ones.
        name: the submodule's name.

    Returns:
        The module.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        name=name,
    )


def layer_norm() -> nn.LayerNorm:
    """The layer norm of regressors, with torch's epsilon and a two-pass variance."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)


class Regressor(nn.Module):
    """Layers in a row, then optionally BatchNorm, a non-linearity and maxout.

    Attributes:
        layers: the linear layers.
        batch_norm: normalize their output, over the batch and all positions.
        activation: the non-linearity of the hint layer, or None.
        pieces: the number of channels of which each maximum is taken. This is the
            non-linearity of a maxout hint layer; 1 leaves the channels unchanged.
    """

    layers: tuple[nn.Module, ...]
    batch_norm: bool = False
    activation: Callable[[Array], Array] | None = None
    pieces: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        """The layers' output, after BatchNorm, maxout and the non-linearity."""
        for layer in self.layers:
            x = layer(x)
        if self.batch_norm:
            x = batch_norm(train)(x)
        if self.pieces > 1:
            x = x.reshape(*x.shape[:-1], -1, self.pieces).max(-1)
        return x if self.activation is None else self.activation(x)


class Resampled(nn.Module):
    """Maps, or tokens on a square grid, averaged to another grid, then a regressor.

    Attributes:
        size: height and width of the grid of the hint.
        keep: the number of tokens before the grid; they are not averaged.
        regressor: the regressor that is applied to the averages.
    """

    size: tuple[int, int]
    keep: int
    regressor: nn.Module

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        """The regressor's output on the resampled grid."""
        if x.ndim == 4:
            x = adaptive_average_pool(x, self.size)
        else:
            grid = adaptive_average_pool(to_grid(x, drop=self.keep), self.size)
            x = jax.numpy.concatenate([x[:, : self.keep], to_tokens(grid)], 1)
        return self.regressor(x, train)


class Resized(nn.Module):
    """A regressor at every position of the guided layer, then a resize to another grid.

    Attributes:
        regressor: the regressor, which keeps the positions.
        size: the sizes of the grid of the hint, one for each axis of positions.
        resize: `(x, size) -> x` on that grid.
    """

    regressor: nn.Module
    size: tuple[int, ...]
    resize: Callable[[Array, tuple[int, ...]], Array] = bilinear_resize

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        """The predictions on the hint's grid."""
        return self.resize(self.regressor(x, train), self.size)


class Orthogonal(nn.Module):
    """A linear map without bias that keeps lengths, or drops directions: VkD's.

    The kernel has orthonormal rows (columns, if it has more rows than columns). It is
    the Q of the QR decomposition of a free matrix, with a positive diagonal of R, so
    weight decay of the free matrix does not change it. (The authors' code trains
    Householder vectors; weight decay can turn its projector to 0.)

    Attributes:
        features: number of output channels.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        """The projected features."""
        wide, narrow = sorted((x.shape[-1], self.features), reverse=True)
        # Of a random normal matrix, Q is uniformly distributed.
        free = self.param("free", nn.initializers.normal(1.0), (wide, narrow))
        q, r = jax.numpy.linalg.qr(free)
        q = jax.numpy.where(jax.numpy.diagonal(r)[None] < 0, -q, q)
        x, kernel = promote_dtype(x, q if x.shape[-1] == wide else q.T, dtype=None)
        return x @ kernel


class ABF(nn.Module):
    """The attention-based fusion (ABF) of ReviewKD: a stage joined by deeper stages.

    With the reduced map x = BN(conv1x1(map)), and the deeper fusion y resized to x::

        z = sigmoid(conv1x1([x, y]))        two maps of weights
        fusion = z_0 x + z_1 y              x alone at the deepest stage
        output = BN(conv3x3(fusion))

    If the sizes of fusion and hint map differ, the fusion is resized to the hint map
    before the last convolution. All resizing is torch's `nearest`.

    Attributes:
        mid: channels of the fusion, the same at all stages.
        features: channels of the hint map.
        size: height and width of the hint map.
    """

    mid: int
    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        deeper: Float[Array, "batch h2 w2 mid"] | None = None,
        train: bool = False,
    ) -> tuple[
        Float[Array, "batch height width features"],
        Float[Array, "batch height width mid"],
    ]:
        """The output, to compare with the hint, and the fusion, for the next ABF."""
        # The published initializations: U(+-sqrt(3 / fan_in)) for the convolutions
        # before and after the fusion, and torch's default, U(+-sqrt(1 / fan_in)), for
        # the attention.
        wide = nn.initializers.variance_scaling(1, "fan_in", "uniform")
        usual = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def usual_bias(key, shape, dtype=jax.numpy.float32):
            bound = (2 * self.mid) ** -0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        x = nn.Conv(self.mid, (1, 1), use_bias=False, kernel_init=wide, name="reduce")(
            x
        )
        x = batch_norm(train, name="reduce_norm")(x)
        if deeper is not None:
            y = nearest_resize(deeper, (x.shape[1], x.shape[2]))
            weigh = nn.Conv(
                2, (1, 1), kernel_init=usual, bias_init=usual_bias, name="attention"
            )
            z = nn.sigmoid(weigh(jax.numpy.concatenate([x, y], -1)))
            x = x * z[..., :1] + y * z[..., 1:]
        x = nearest_resize(x, self.size)
        expand = nn.Conv(
            self.features,
            (3, 3),
            padding=1,
            use_bias=False,
            kernel_init=wide,
            name="expand",
        )
        return batch_norm(train, name="expand_norm")(expand(x)), x


class Embedding(nn.Module):
    """CRD's embedding head: a linear map of the pooled features, of norm 1.

    Maps and tokens are averaged over their positions first.

    Attributes:
        features: size of the embedding.
    """

    features: int = 128

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch features"]:
        """The embedding of each example."""
        x = x.mean(tuple(range(1, x.ndim - 1)))
        return unit(nn.Dense(self.features, name="linear")(x))


class Coder(nn.Module):
    """Three 3x3 convolutions with leaky ReLUs: FT's translator, and its paraphraser.

    Attributes:
        channels: the number of output channels of each convolution.
        batch_norm: normalize before each non-linearity, as the translator does.
    """

    channels: tuple[int, ...]
    batch_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], train: bool = False
    ) -> Float[Array, "batch h w k"]:
        """The code of each position."""
        for features in self.channels:
            x = nn.Conv(features, (3, 3), padding=1)(x)
            if self.batch_norm:
                x = batch_norm(train)(x)
            x = nn.leaky_relu(x, 0.1)
        return x


class Generator(nn.Module):
    """MGD's generator: it generates a hint map from a partly masked guided map.

    A 1x1 convolution aligns the guided map to the hint's channels, if they differ. The
    map is then masked, and passes two 3x3 convolutions with a ReLU between them.

    Attributes:
        features: channels of the hint map.
    """

    features: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        train: bool = False,
        mask: Bool[Array, "batch _ _ _"] | None = None,
    ) -> Float[Array, "batch h w features"]:
        """The generated hint map."""
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="align")(x)
        x = x if mask is None else jax.numpy.where(mask, x, 0)
        x = nn.relu(nn.Conv(self.features, (3, 3), padding=1, name="hidden")(x))
        return nn.Conv(self.features, (3, 3), padding=1, name="generate")(x)


class Bottleneck(nn.Module):
    """SimKD's projector: 1x1, 3x3 and 1x1 convolutions, each with BatchNorm and ReLU.

    Attributes:
        hidden: channels of the first two convolutions.
        features: channels of the hint map.
    """

    hidden: int
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], train: bool = False
    ) -> Float[Array, "batch h w features"]:
        """The projected map."""
        for features, kernel in (
            (self.hidden, 1),
            (self.hidden, 3),
            (self.features, 1),
        ):
            x = nn.Conv(features, 2 * (kernel,), padding=kernel // 2, use_bias=False)(x)
            x = nn.relu(batch_norm(train)(x))
        return x


def init(
    regressor: nn.Module, key: Key[Array, ""], shape: Shape
) -> tuple[PyTree, PyTree]:
    """Parameters and state of a regressor.

    Args:
        regressor: the module.
        key: the random key of the initialization.
        shape: the shape of the guided layer, batch included.

    Returns:
        `(params, state)`; state holds BatchNorm's statistics, or is empty.
    """
    variables = dict(regressor.init(key, jax.numpy.zeros(shape)))
    return variables.pop("params", {}), variables


def apply(
    regressor: nn.Module,
    params: PyTree,
    state: PyTree,
    x: Float[Array, "batch ..."],
    train: bool,
) -> tuple[Float[Array, "batch ..."], PyTree]:
    """Applies a regressor; its state changes only if `train`."""
    y, changed = regressor.apply(
        {"params": params, **state}, x, train, mutable=list(state) if train else []
    )
    return y, {**state, **changed}
