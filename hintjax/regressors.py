"""Regressors: from the guided layer's output to the hint layer's shape.

A regressor is a small Flax module, `module(x, train)`, whose parameters live in a
tree of their own, never inside the student. A method is given a *sizing* function,

    sizing(student_shape, teacher_shape) -> module

(shapes of one example, channels last), so that nobody types channels or strides.
Options are bound with `functools.partial`::

    partial(regressors.conv, batch_norm=True, activation=nn.relu)

Every regressor treats each example alone, and takes any batch size after
initialisation. BatchNorm, where asked for, is the one exception while training.

Maps (h, w, c) and tokens (n, c) do not meet in a regressor: one of the two is first
seen as the other, by `to_grid` or `to_tokens`, and `hintjax.viewed` makes a method see
its hints so. That holds for the hint as well, whose class token no map can predict.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Key, PyTree

from hintjax._checks import (
    described,
    function,
    instance,
    integer,
    is_array,
    message,
    sizes,
)
from hintjax._numerics import adaptive_average_pool, nearest_resize, unit

Shape = tuple[int, ...]
Sizing = Callable[[Shape, Shape], nn.Module]


class Regressor(nn.Module):
    """Layers in a row, then optionally BatchNorm, a non-linearity and maxout.

    Attributes:
        layers: the linear layers.
        batch_norm: normalise their output, over the batch and all positions.
        activation: the hint layer's non-linearity, or None.
        pieces: channels are reduced by the maximum over this many pieces, which
            is the non-linearity of a maxout hint layer; 1 reduces nothing.
    """

    layers: tuple[nn.Module, ...]
    batch_norm: bool = False
    activation: Callable[[Array], Array] | None = None
    pieces: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        for layer in self.layers:
            x = layer(x)
        if self.batch_norm:
            # Two-pass variance: E[x^2] - E[x]^2 cancels for large means.
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                use_fast_variance=False,
            )(x)
        if self.pieces > 1:
            x = x.reshape(*x.shape[:-1], -1, self.pieces).max(-1)
        return x if self.activation is None else self.activation(x)


class Resampled(nn.Module):
    """Maps, or tokens on a square grid, averaged to another grid, then a regressor.

    Attributes:
        size: height and width of the grid of the hint.
        keep: how many tokens stand before the grid; they are not averaged.
        regressor: what follows.
    """

    size: tuple[int, int]
    keep: int
    regressor: nn.Module

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch ..."]:
        if x.ndim == 4:
            x = adaptive_average_pool(x, self.size)
        else:
            grid = adaptive_average_pool(to_grid(x, drop=self.keep), self.size)
            x = jax.numpy.concatenate([x[:, : self.keep], to_tokens(grid)], 1)
        return self.regressor(x, train)


class ABF(nn.Module):
    """Attention based fusion (ABF) of ReviewKD: a stage joined by the deeper ones.

    With the reduced map x = BN(conv1x1(map)) and the deeper fusion y, resized to it::

        z = sigmoid(conv1x1([x, y]))        two maps of weights
        fusion = z_0 x + z_1 y              x alone at the deepest stage
        output = BN(conv3x3(fusion))

    The fusion is resized to the hint map's size before the last convolution if it has
    another. All resizing is torch's `nearest`.

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

        def norm(name):
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                use_fast_variance=False,
                name=name,
            )

        # The published initialisations: U(+-sqrt(3 / fan_in)) around the fusion and
        # torch's own, U(+-sqrt(1 / fan_in)), for the attention.
        wide = nn.initializers.variance_scaling(1, "fan_in", "uniform")
        usual = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def usual_bias(key, shape, dtype=jax.numpy.float32):
            bound = (2 * self.mid) ** -0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        x = nn.Conv(self.mid, (1, 1), use_bias=False, kernel_init=wide, name="reduce")(
            x
        )
        x = norm("reduce_norm")(x)
        if deeper is not None:
            y = nearest_resize(deeper, x.shape[1:3])
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
        return norm("expand_norm")(expand(x)), x


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
        x = x.mean(tuple(range(1, x.ndim - 1)))
        return unit(nn.Dense(self.features, name="linear")(x))


class Coder(nn.Module):
    """Three 3x3 convolutions with leaky ReLUs: FT's translator, and its paraphraser.

    Attributes:
        channels: of each convolution.
        batch_norm: normalise before each non-linearity, as the translator does.
    """

    channels: tuple[int, ...]
    batch_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], train: bool = False
    ) -> Float[Array, "batch h w k"]:
        for features in self.channels:
            x = nn.Conv(features, (3, 3), padding=1)(x)
            if self.batch_norm:
                x = _batch_norm(train)(x)
            x = nn.leaky_relu(x, 0.1)
        return x


class Generator(nn.Module):
    """MGD's generation of a hint map from a guided map of which a part is masked.

    The guided map is aligned to the hint's channels (a 1x1 convolution, where they
    differ), masked, and sent through two 3x3 convolutions with a ReLU between them.

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
        for features, kernel in (
            (self.hidden, 1),
            (self.hidden, 3),
            (self.features, 1),
        ):
            x = nn.Conv(features, 2 * (kernel,), padding=kernel // 2, use_bias=False)(x)
            x = nn.relu(_batch_norm(train)(x))
        return x


def bottleneck(student: Shape, teacher: Shape, *, factor: int = 2) -> Bottleneck:
    """SimKD's projector between two maps of one size; see `Bottleneck`.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)`.
        teacher: shape of the hint layer, with the same positions.
        factor: the hint's channels are divided by it in the middle.

    Returns:
        A module `(batch, h, w, c) -> (batch, h, w, channels)`.

    Raises:
        ValueError: if either is not a map, or the positions differ.

    >>> bottleneck((8, 8, 16), (8, 8, 64)).hidden
    32

    References:
        Chen et al. 2022, Knowledge Distillation with the Reused Teacher Classifier.
    """
    _maps("regressors.bottleneck", student, teacher)
    _same_positions("regressors.bottleneck", student, teacher)
    integer("regressors.bottleneck", 1, factor=factor)
    return Bottleneck(max(1, teacher[-1] // factor), teacher[-1])


def identity(student: Shape, teacher: Shape) -> Regressor:
    """No regressor: for layers of equal shape, when this is what you want.

    Args:
        student: shape of the guided layer, one example.
        teacher: shape of the hint layer, one example.

    Returns:
        A module without parameters.

    Raises:
        ValueError: if the shapes differ.

    References:
        FitNets' code adds none where shapes agree; later work found that a
        trained projector helps even there, so it is not the default.
    """
    _shapes("regressors.identity", student, teacher)
    if student != teacher:
        raise ValueError(
            f"regressors.identity: expected equal shapes, got student {student} and "
            f"teacher {teacher}. Use regressors.linear or regressors.conv."
        )
    return Regressor(layers=())


def linear(
    student: Shape,
    teacher: Shape,
    *,
    batch_norm: bool = False,
    activation: Callable[[Array], Array] | None = None,
    pieces: int = 1,
    bias: bool = True,
) -> Regressor:
    """One linear map of the channels, the same at every position.

    A 1x1 convolution on maps, a dense layer on vectors and on tokens.

    Args:
        student: shape of the guided layer, one example: `(*positions, c)`.
        teacher: shape of the hint layer, with the same positions.
        batch_norm: see `Regressor`.
        activation: see `Regressor`.
        pieces: see `Regressor`.
        bias: add one; it has no effect in front of a BatchNorm.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.

    >>> module = linear((7, 7, 8), (7, 7, 32))
    >>> module.layers[0].features
    32
    """
    _same_positions("regressors.linear", student, teacher)
    _options("regressors.linear", activation, pieces=pieces)
    layer = nn.Dense(teacher[-1] * pieces, use_bias=bias)
    return Regressor((layer,), batch_norm, activation, pieces)


def mlp(
    student: Shape,
    teacher: Shape,
    *,
    hidden: int | None = None,
    depth: int = 1,
    bias: bool = True,
    batch_norm: bool = False,
    activation: Callable[[Array], Array] | None = None,
) -> Regressor:
    """Hidden layers with ReLU, the same at every position.

    Args:
        student: shape of the guided layer, one example: `(*positions, c)`.
        teacher: shape of the hint layer, with the same positions.
        hidden: width of a hidden layer; by default the hint layer's channels.
        depth: how many hidden layers; VID's mean has 2, without biases.
        bias: add one in every layer.
        batch_norm: see `Regressor`.
        activation: see `Regressor`.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.
    """
    _same_positions("regressors.mlp", student, teacher)
    width = teacher[-1] if hidden is None else hidden
    _options("regressors.mlp", activation, hidden=width)
    integer("regressors.mlp", 0, depth=depth)
    layers = [
        nn.Sequential([nn.Dense(width, use_bias=bias), nn.relu]) for _ in range(depth)
    ]
    last = nn.Dense(teacher[-1], use_bias=bias)
    return Regressor((*layers, last), batch_norm, activation)


def conv(
    student: Shape,
    teacher: Shape,
    *,
    batch_norm: bool = False,
    activation: Callable[[Array], Array] | None = None,
    pieces: int = 1,
) -> Regressor:
    """A convolution sized for any two maps, axis by axis.

    For a guided map of n positions and a hint map of m along an axis::

        n = m        kernel 1
        n = r m      kernel 2r - 1, stride r, padding r - 1
        n > m        kernel n - m + 1, VALID
        m = r n      transposed, kernel r + 2, stride r, padding 1 (torch's)
        m > n        transposed, kernel m - n + 1, stride 1, padding 0

    If the map shrinks along one axis and grows along the other, a convolution is
    followed by a transposed one.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)`.
        teacher: shape of the hint layer, one example: `(h, w, c)`.
        batch_norm: see `Regressor`.
        activation: see `Regressor`.
        pieces: see `Regressor`.

    Returns:
        A module `(batch, h, w, c) -> (batch, *teacher)`.

    Raises:
        ValueError: if either is not a map.

    Convention:
        For r = 2, VALID and equal sizes this is ConvReg of the CRD benchmark,
        which adds `batch_norm=True, activation=nn.relu`. Behind a BatchNorm that
        uses batch statistics the bias has no gradient; it is kept as published.

    >>> module = conv((8, 8, 16), (4, 4, 32))
    >>> module.layers[0].kernel_size, module.layers[0].strides
    ((3, 3), (2, 2))

    References:
        Romero et al. 2015, FitNets (the VALID form); Tian et al. 2020, CRD, code
        (ConvReg).
    """
    _maps("regressors.conv", student, teacher)
    _options("regressors.conv", activation, pieces=pieces)
    features = teacher[-1] * pieces
    extents = list(zip(student[:-1], teacher[:-1], strict=True))
    grows = [m > n for n, m in extents]
    layers = []
    if not all(grows):
        kernel, strides, padding = zip(*map(_shrink, extents), strict=True)
        layers.append(nn.Conv(features, kernel, strides, padding))
    if any(grows):
        kernel, strides, padding = zip(*map(_grow, extents), strict=True)
        # Torch's layout and padding p: flax pads the dilated input by k - 1 - p.
        layers.append(
            nn.ConvTranspose(features, kernel, strides, padding, transpose_kernel=True)
        )
    return Regressor(tuple(layers), batch_norm, activation, pieces)


def valid_conv(
    student: Shape,
    teacher: Shape,
    *,
    batch_norm: bool = False,
    activation: Callable[[Array], Array] | None = None,
    pieces: int = 1,
) -> Regressor:
    """FitNets' own regressor: VALID, with kernel n - m + 1 along each axis.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)`.
        teacher: shape of the hint layer, no larger than the guided one.
        batch_norm: see `Regressor`.
        activation: the hint layer's non-linearity; the paper uses the same.
        pieces: see `Regressor`; 2 for the paper's maxout hints.

    Returns:
        A module `(batch, h, w, c) -> (batch, *teacher)`.

    Raises:
        ValueError: if either is not a map, or the hint map is the larger one.

    >>> valid_conv((8, 8, 16), (5, 5, 32)).layers[0].kernel_size
    (4, 4)

    References:
        Romero et al. 2015, section 2.2.
    """
    _maps("regressors.valid_conv", student, teacher)
    _options("regressors.valid_conv", activation, pieces=pieces)
    kernel = tuple(n - m + 1 for n, m in zip(student[:-1], teacher[:-1], strict=True))
    if min(kernel) < 1:
        raise ValueError(
            f"regressors.valid_conv: expected a guided map at least as large as the "
            f"hint map, got student {student} and teacher {teacher}. Use "
            f"regressors.conv, which transposes."
        )
    layer = nn.Conv(teacher[-1] * pieces, kernel, padding="VALID")
    return Regressor((layer,), batch_norm, activation, pieces)


def resampled(
    student: Shape,
    teacher: Shape,
    *,
    keep: int = 0,
    sizing: Sizing = linear,
) -> Resampled:
    """The guided layer averaged to the hint's grid, then a regressor of equal positions.

    Between two maps, or two sequences of tokens, of which the first `keep` (class
    tokens) stay as they are and the others form a square grid. A grid that grows repeats
    its entries, or averages neighbours.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)` or `(n, c)`.
        teacher: shape of the hint layer, of the same kind.
        keep: how many tokens both sequences begin with that are not on the grid.
        sizing: sizes the regressor that follows.

    Returns:
        A module `(batch, *student) -> (batch, *teacher)`.

    Raises:
        ValueError: if one is a map and the other is not, or if tokens form no grid.

    Convention:
        The averages are those of torch's `adaptive_avg_pool2d`.

    >>> module = resampled((1 + 8 * 8, 32), (1 + 4 * 4, 64), keep=1)
    >>> module.size, module.regressor.layers[0].features
    ((4, 4), 64)
    """
    where = "regressors.resampled"
    _shapes(where, student, teacher)
    instance(where, int, keep=keep)
    function(where, sizing=sizing)
    kinds = len(student), len(teacher)
    if kinds not in ((2, 2), (3, 3)) or (keep and kinds == (3, 3)):
        wanted = "two maps (h, w, c) and keep=0, or two sequences of tokens (n, c)"
        got = f"student {student} and teacher {teacher} with keep={keep}"
        do = "View tokens as maps with hintjax.viewed and regressors.to_grid."
        raise ValueError(message(where, wanted, got, do))
    if kinds == (3, 3):
        return Resampled(teacher[:2], 0, sizing((*teacher[:2], student[-1]), teacher))
    _grid(where, student[0], keep, "keep")
    size = _grid(where, teacher[0], keep, "keep")
    return Resampled(size, keep, sizing((teacher[0], student[-1]), teacher))


def to_grid(
    tokens: Float[Array, "batch n c"],
    *,
    drop: int = 0,
    size: tuple[int, int] | None = None,
) -> Float[Array, "batch h w c"]:
    """Tokens as a map, in reading order, without the first `drop` of them.

    Args:
        tokens: of patches, behind the class tokens.
        drop: how many class tokens there are: 1 for a ViT, 2 with DeiT's distillation
            token.
        size: height and width of the grid; by default it is square.

    Returns:
        The map.

    Raises:
        ValueError: if what is left does not form the grid.

    >>> to_grid(jax.numpy.zeros((2, 1 + 7 * 7, 8)), drop=1).shape
    (2, 7, 7, 8)
    """
    where = "regressors.to_grid"
    if not is_array(tokens) or tokens.ndim != 3:
        got = described(tokens)
        do = "Name a layer whose output is a sequence of tokens."
        raise ValueError(message(where, "tokens (batch, n, c)", got, do))
    instance(where, int, drop=drop)
    if size is not None:
        sizes(where, 2, size=size)
    size = _grid(where, tokens.shape[1], drop, "drop", size)
    return tokens[:, drop:].reshape(tokens.shape[0], *size, tokens.shape[2])


def to_tokens(maps: Float[Array, "batch h w c"]) -> Float[Array, "batch n c"]:
    """A map as tokens, in reading order: the inverse of `to_grid`.

    Args:
        maps: the map.

    Returns:
        Its n = h w positions as tokens.

    Raises:
        ValueError: if it is no map.

    >>> to_tokens(jax.numpy.zeros((2, 7, 7, 8))).shape
    (2, 49, 8)
    """
    if not is_array(maps) or maps.ndim != 4:
        do = "Name a layer whose output is a map."
        got = described(maps)
        raise ValueError(
            message("regressors.to_tokens", "maps (batch, h, w, c)", got, do)
        )
    batch, height, width, channels = maps.shape
    return maps.reshape(batch, height * width, channels)


def fit(student: Shape, teacher: Shape) -> Regressor:
    """The default: `conv` between two maps, `linear` between anything else."""
    _shapes("regressors.fit", student, teacher)
    maps = len(student) == len(teacher) == 3
    return conv(student, teacher) if maps else linear(student, teacher)


def init(
    regressor: nn.Module, key: Key[Array, ""], shape: Shape
) -> tuple[PyTree, PyTree]:
    """Parameters and state of a regressor.

    Args:
        regressor: the module.
        key: for its initialisation.
        shape: the guided layer's, batch included.

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
    """Applies a regressor; the state moves only while training."""
    y, changed = regressor.apply(
        {"params": params, **state}, x, train, mutable=list(state) if train else []
    )
    return y, {**state, **changed}


def _batch_norm(train):
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
    )


def _shrink(extent):
    n, m = extent
    if m >= n:
        return 1, 1, (0, 0)
    if n % m == 0:
        ratio = n // m
        return 2 * ratio - 1, ratio, (ratio - 1, ratio - 1)
    return n - m + 1, 1, (0, 0)


def _grow(extent):
    n, m = extent
    if m <= n:
        return 1, 1, (0, 0)
    if m % n == 0:
        ratio = m // n
        return ratio + 2, ratio, (ratio, ratio)
    return m - n + 1, 1, (m - n, m - n)


def _grid(where, tokens, aside, name, size=None):
    """Height and width of the grid of all tokens but the first `aside`."""
    if not 0 <= aside < tokens:
        wanted = f"{name} from 0 to less than the {tokens} tokens"
        raise ValueError(message(where, wanted, f"{aside}"))
    left = tokens - aside
    height, width = size or 2 * (math.isqrt(left),)
    if height * width != left:
        wanted = f"a grid of {height}x{width}" if size else "tokens on a square grid"
        got = f"{tokens} tokens with {name}={aside}"
        more = tokens - height * width
        do = f"{name}={more} leaves {height}x{width}"
        if size is None:
            do += "; for a grid that is not square, regressors.to_grid takes its size"
        elif more < 0:
            do = "Give the size of its grid"
        raise ValueError(message(where, wanted, got, f"{do}."))
    return height, width


def _same_positions(where, student, teacher):
    _shapes(where, student, teacher)
    if student[:-1] != teacher[:-1]:
        ways = {
            (3, 3): "regressors.conv between maps of unequal size",
            (2, 2): "regressors.resampled between unequal numbers of tokens",
        }
        view = "regressors.to_grid, with hintjax.viewed, to see tokens as a map"
        raise ValueError(
            f"{where}: expected the same positions, got student {student} and teacher "
            f"{teacher}. Use {ways.get((len(student), len(teacher)), view)}."
        )


def _shapes(where, student, teacher):
    sizes(where, 0, student=student, teacher=teacher)


def _options(where, activation, **counts):
    integer(where, 1, **counts)
    if activation is not None:
        function(where, activation=activation)


def _maps(where, student, teacher):
    _shapes(where, student, teacher)
    if len(student) != 3 or len(teacher) != 3:
        raise ValueError(
            f"{where}: expected two maps (h, w, c), got student {student} and teacher "
            f"{teacher}. Use regressors.linear between vectors or tokens."
        )
