"""Sizing: regressors that map the guided layer to the hint layer's shape.

A regressor is a small Flax module, `module(x, train)`, whose parameters live in a
tree of their own, never inside the student. A method takes a *sizing* function,

    sizing(student_shape, teacher_shape) -> module

(shapes of one example, channels last), so that no user has to type channels or strides.
Options are bound with `functools.partial`::

    partial(regressors.conv, batch_norm=True, activation=nn.relu)

Every regressor processes each example independently, and accepts any batch size after
initialization. The only exception is BatchNorm during training, if it is requested.

No regressor maps between maps (h, w, c) and tokens (n, c). First convert one of the two
by `to_grid` or `to_tokens`; `hintjax.viewed` does this for the hints of a method. If
the hint has a class token, drop it, because no map can predict it.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array

from hintjax._checks import Refusal, function, instance, integer, message
from hintjax.regressors.grids import check_shapes, grid_of, same_positions
from hintjax.regressors.modules import (
    Bottleneck,
    Orthogonal,
    Regressor,
    Resampled,
    Shape,
    Sizing,
    layer_norm,
)


def bottleneck(student: Shape, teacher: Shape, *, factor: int = 2) -> Bottleneck:
    """SimKD's projector between two maps of one size; see `Bottleneck`.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)`.
        teacher: shape of the hint layer, with the same positions.
        factor: the hidden layers have the hint's channels divided by this factor.

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
    same_positions("regressors.bottleneck", student, teacher)
    integer("regressors.bottleneck", 1, factor=factor)
    return Bottleneck(max(1, teacher[-1] // factor), teacher[-1])


def identity(student: Shape, teacher: Shape) -> Regressor:
    """No regressor: the guided layer itself, for layers of equal shape.

    Args:
        student: shape of the guided layer, one example.
        teacher: shape of the hint layer, one example.

    Returns:
        A module without parameters.

    Raises:
        ValueError: if the shapes differ.

    References:
        FitNets' code adds no regressor if the shapes are equal. Later work found that a
        trained projector helps even then, so `identity` is not the default.
    """
    check_shapes("regressors.identity", student, teacher)
    if student != teacher:
        got = f"student {student} and teacher {teacher}"
        do = "Use regressors.linear or regressors.conv."
        raise Refusal(message("regressors.identity", "equal shapes", got, do))
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
        bias: add a bias; it has no effect before a BatchNorm.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.

    >>> module = linear((7, 7, 8), (7, 7, 32))
    >>> module.layers[0].features
    32
    """
    same_positions("regressors.linear", student, teacher)
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
        depth: the number of hidden layers; VID's mean has 2, without biases.
        bias: add a bias in every layer.
        batch_norm: see `Regressor`.
        activation: see `Regressor`.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.
    """
    same_positions("regressors.mlp", student, teacher)
    width = teacher[-1] if hidden is None else hidden
    _options("regressors.mlp", activation, hidden=width)
    integer("regressors.mlp", 0, depth=depth)
    layers = [
        nn.Sequential([nn.Dense(width, use_bias=bias), nn.relu]) for _ in range(depth)
    ]
    last = nn.Dense(teacher[-1], use_bias=bias)
    return Regressor((*layers, last), batch_norm, activation)


def layer_norm_mlp(
    student: Shape, teacher: Shape, *, hidden: int | None = None, depth: int = 1
) -> Regressor:
    """Hidden layers with layer norm and GELU: the heads of RADIO and lightly.

    Linear, layer norm, GELU for each hidden layer, then linear, the same at every
    position.

    Args:
        student: shape of the guided layer, one example: `(*positions, c)`.
        teacher: shape of the hint layer, with the same positions.
        hidden: width of a hidden layer; by default the hint layer's channels.
        depth: the number of hidden layers.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.

    Convention:
        The exact GELU and a layer norm with epsilon 1e-5, as in torch.

    References:
        Ranzinger et al. 2024, AM-RADIO; lightly-train, code (DistillationV2Head, with
        2048 hidden channels).
    """
    same_positions("regressors.layer_norm_mlp", student, teacher)
    width = teacher[-1] if hidden is None else hidden
    _options("regressors.layer_norm_mlp", None, hidden=width)
    integer("regressors.layer_norm_mlp", 0, depth=depth)
    layers = [
        nn.Sequential(
            [nn.Dense(width), layer_norm(), partial(nn.gelu, approximate=False)]
        )
        for _ in range(depth)
    ]
    return Regressor((*layers, nn.Dense(teacher[-1])))


def orthogonal(student: Shape, teacher: Shape) -> Orthogonal:
    """VkD's projector: a linear map of the channels that only rotates them.

    Args:
        student: shape of the guided layer, one example: `(*positions, c)`.
        teacher: shape of the hint layer, with the same positions.

    Returns:
        A module `(batch, *positions, c) -> (batch, *positions, channels)`.

    Raises:
        ValueError: if the positions differ.

    References:
        Miles, Elezi, Deng 2024, VkD: Improving Knowledge Distillation using Orthogonal
        Projections.
    """
    same_positions("regressors.orthogonal", student, teacher)
    return Orthogonal(teacher[-1])


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
    followed by a transposed convolution.

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
        which adds `batch_norm=True, activation=nn.relu`. Before a BatchNorm that
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
        # Torch's layout and padding p: Flax pads the dilated input by k - 1 - p.
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
        activation: the non-linearity; the paper uses that of the hint layer.
        pieces: see `Regressor`; 2 for the paper's maxout hints.

    Returns:
        A module `(batch, h, w, c) -> (batch, *teacher)`.

    Raises:
        ValueError: if either is not a map, or the hint map is larger.

    >>> valid_conv((8, 8, 16), (5, 5, 32)).layers[0].kernel_size
    (4, 4)

    References:
        Romero et al. 2015, section 2.2.
    """
    _maps("regressors.valid_conv", student, teacher)
    _options("regressors.valid_conv", activation, pieces=pieces)
    kernel = tuple(n - m + 1 for n, m in zip(student[:-1], teacher[:-1], strict=True))
    if min(kernel) < 1:
        wanted = "a guided map at least as large as the hint map"
        got = f"student {student} and teacher {teacher}"
        do = "Use regressors.conv, which can also enlarge maps."
        raise Refusal(message("regressors.valid_conv", wanted, got, do))
    layer = nn.Conv(teacher[-1] * pieces, kernel, padding="VALID")
    return Regressor((layer,), batch_norm, activation, pieces)


def resampled(
    student: Shape,
    teacher: Shape,
    *,
    keep: int = 0,
    sizing: Sizing = linear,
) -> Resampled:
    """The guided layer averaged to the hint's grid, then another regressor.

    It works between two maps or two sequences of tokens. The first `keep` tokens (class
    tokens) are not averaged, and the others form a square grid. If the grid grows,
    entries are repeated, or neighbors are averaged.

    Args:
        student: shape of the guided layer, one example: `(h, w, c)` or `(n, c)`.
        teacher: shape of the hint layer, of the same kind.
        keep: the number of tokens before the grid, in both sequences.
        sizing: makes the regressor that follows, between layers with equal positions.

    Returns:
        A module `(batch, *student) -> (batch, *teacher)`.

    Raises:
        ValueError: if only one is a map, or if the tokens do not form a square grid.

    Convention:
        The averages are those of torch's `adaptive_avg_pool2d`.

    >>> module = resampled((1 + 8 * 8, 32), (1 + 4 * 4, 64), keep=1)
    >>> module.size, module.regressor.layers[0].features
    ((4, 4), 64)
    """
    where = "regressors.resampled"
    check_shapes(where, student, teacher)
    instance(where, int, keep=keep)
    function(where, sizing=sizing)
    kinds = len(student), len(teacher)
    if kinds not in ((2, 2), (3, 3)) or (keep and kinds == (3, 3)):
        wanted = "two maps (h, w, c) and keep=0, or two sequences of tokens (n, c)"
        got = f"student {student} and teacher {teacher} with keep={keep}"
        do = "View tokens as maps with hintjax.viewed and regressors.to_grid."
        raise Refusal(message(where, wanted, got, do))
    if kinds == (3, 3):
        height, width, _ = teacher
        size = height, width
        return Resampled(size, 0, sizing((*size, student[-1]), teacher))
    grid_of(where, student[0], keep, "keep")
    size = grid_of(where, teacher[0], keep, "keep")
    return Resampled(size, keep, sizing((teacher[0], student[-1]), teacher))


def fit(student: Shape, teacher: Shape) -> Regressor:
    """The default regressor: `conv` between two maps, else `linear`.

    Args:
        student: shape of the guided layer, one example.
        teacher: shape of the hint layer, one example.

    Returns:
        The module.
    """
    check_shapes("regressors.fit", student, teacher)
    maps = len(student) == len(teacher) == 3
    return conv(student, teacher) if maps else linear(student, teacher)


def _shrink(extent: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """Kernel, stride and padding that shrink an axis from n to m; else 1, 1, 0."""
    n, m = extent
    if m >= n:
        return 1, 1, (0, 0)
    if n % m == 0:
        ratio = n // m
        return 2 * ratio - 1, ratio, (ratio - 1, ratio - 1)
    return n - m + 1, 1, (0, 0)


def _grow(extent: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """Kernel, stride and padding that grow an axis from n to m; else 1, 1, 0."""
    n, m = extent
    if m <= n:
        return 1, 1, (0, 0)
    if m % n == 0:
        ratio = m // n
        return ratio + 2, ratio, (ratio, ratio)
    return m - n + 1, 1, (m - n, m - n)


def _options(
    where: str, activation: Callable[[Array], Array] | None, **counts: int
) -> None:
    """Raise unless the counts are integers >= 1 and the activation is a function."""
    integer(where, 1, **counts)
    if activation is not None:
        function(where, activation=activation)


def _maps(where: str, student: Shape, teacher: Shape) -> None:
    """Raise unless both are shapes of maps (h, w, c)."""
    check_shapes(where, student, teacher)
    if len(student) != 3 or len(teacher) != 3:
        got = f"student {student} and teacher {teacher}"
        do = "Use regressors.linear between vectors or tokens."
        raise Refusal(message(where, "two maps (h, w, c)", got, do))
