"""Attention transfer (AT): matches the positions that the networks attend to."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import (
    absolute_power,
    adaptive_average_pool,
    as_float,
    keep,
    masked_mean,
    norm,
    unit,
)
from hintjax.losses._positions import check_maps, on_one_grid


def attention_map(
    features: Float[Array, "*shape c"],
    *,
    power: int = 2,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch n"]:
    """Attention map (AT): the energy at each position, as a unit vector.

    q_j = Q_j / ||Q||_2,  Q_j = mean_c |F_jc|^p,  j over the positions

    Args:
        features: a feature map (*batch h w c), tokens (*batch n c), or a volume: any
            number of axes of positions.
        power: p, an integer >= 1; a larger p gives strong positions more weight.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples or positions (*batch *positions) that count; the map
            is 0 at the others.

    Returns:
        A map of norm 1 (0 if all features are 0), flattened row by row.

    Convention:
        The code takes the mean over channels and the paper the sum; dividing by the
        norm removes this factor. The code takes no absolute value, so its maps keep
        signs for an odd p (`attention_map_code`).

    >>> features = jnp.array([[[[0.0], [3.0]], [[4.0], [0.0]]]])
    >>> attention_map(features, power=1)
    Array([[0. , 0.6, 0.8, 0. ]], dtype=float32)

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, 2017.
        https://arxiv.org/abs/1612.03928
        https://github.com/szagoruyko/attention-transfer (utils.py)
    """
    features = _features("attention_map", features, power, batch_dims, where)
    return _unit_map(absolute_power(features, power), batch_dims)


def attention_map_code(
    features: Float[Array, "*shape c"],
    *,
    power: int = 2,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch n"]:
    """Attention map (AT) as in the code: an odd power keeps the signs.

    q_j = Q_j / ||Q||_2,  Q_j = mean_c F_jc^p,  j over the positions

    Args:
        features: as for `attention_map`.
        power: p, an integer >= 1.
        batch_dims: number of leading axes over examples.
        where: mask of the examples or positions (*batch *positions) that count; the map
            is 0 at the others.

    Returns:
        A map of norm 1 (0 if all energies are 0), flattened row by row.

    Convention:
        The authors' and RepDistiller's code. It is `attention_map` for an even p, and
        for features >= 0. Pass it as `attention=` to the losses and the method.

    >>> attention_map_code(jnp.array([[[3.0], [-4.0]]]), power=1)
    Array([[ 0.6, -0.8]], dtype=float32)

    References:
        https://github.com/szagoruyko/attention-transfer (utils.py)
        https://github.com/HobbitLong/RepDistiller (AT.py)
    """
    features = _features("attention_map_code", features, power, batch_dims, where)
    return _unit_map(jax.lax.integer_pow(features, power), batch_dims)


def attention_maps(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape2 c2"],
    *,
    power: int = 2,
    attention: Callable[..., Float[Array, "..."]] = attention_map,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """Attention maps (AT) of both networks, of the same length: ready to compare.

    If the sizes differ, the larger features (not their map) are averaged down to the
    smaller size, along each axis separately. The numbers of channels may differ.

    Args:
        student: feature map of the student, (*batch *positions c).
        teacher: feature map of the teacher, of the same examples, with positions on as
            many axes.
        power: p, an integer >= 1.
        attention: makes the map of one network: `attention_map`, or
            `attention_map_code` for the signs of the code's odd powers.
        batch_dims: number of leading axes over examples.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        The map of the student and the map of the teacher.

    >>> student, teacher = jnp.ones((2, 4, 4, 8)), jnp.ones((2, 8, 8, 16))
    >>> [m.shape for m in attention_maps(student, teacher)]
    [(2, 16), (2, 16)]
    """
    return _maps(
        "attention_maps", student, teacher, power, attention, batch_dims, where
    )


def attention_energy(
    features: Float[Array, "*shape c"], size: Sequence[int], *, power: int = 2
) -> Float[Array, "*smaller 1"]:
    """Attention energy (AT): one channel with the same attention map as all channels.

    E_j = (mean_c |F_jc|^p)^(1/p),  after F is averaged down to at most `size`

    `attention_maps(student, E)` equals `attention_maps(student, F)` up to rounding, for
    a student of this size. So a stored teacher needs one channel.

    Args:
        features: feature map of the teacher, (*batch *positions c).
        size: number of positions on each axis of the student's feature map.
        power: p, an integer >= 1.

    Returns:
        The energy of each position. Its axes have the smaller size of the two maps.

    >>> attention_energy(jnp.array([[[3.0, 4.0]]]), (1, 1))
    Array([[[3.535534]]], dtype=float32)
    """
    features = as_float("attention_energy", features)
    _checks.instance("attention_energy", Sequence, size=size)
    sizes = {f"size[{axis}]": n for axis, n in enumerate(size)}
    _checks.positive_int("attention_energy", power=power, **sizes)
    wanted = "*batch *positions c"
    _checks.rank("attention_energy", len(size) + 1, wanted, features=features)
    smaller = tuple(map(min, size, features.shape[-1 - len(size) : -1]))
    pooled = adaptive_average_pool(features, smaller)
    energy = jnp.mean(absolute_power(pooled, power), -1, keepdims=True)
    return energy ** (1 / power)


def attention_map_loss(
    student: Float[Array, "*batch n"],
    teacher: Float[Array, "*batch n"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Attention transfer (AT) between maps: the mean squared difference.

    L = mean_j (s_j - t_j)^2

    This is the second half of `attention_transfer_loss`. Maps of the same length can be
    stacked, so that many pairs of layers are compared at once.

    Args:
        student: maps of the student.
        teacher: maps of the teacher.
        where: mask of the examples or positions (*batch n) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        The same as that of `attention_transfer_loss`.

    >>> attention_map_loss(jnp.array([0.6, 0.8]), jnp.array([1.0, 0.0]))
    Array(0.4..., dtype=float32)
    """
    error = _error("attention_map_loss", student, teacher, where)
    return masked_mean(jnp.square(error), where, error.ndim - 1)


def attention_map_loss_paper(
    student: Float[Array, "*batch n"],
    teacher: Float[Array, "*batch n"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Attention transfer (AT) between maps as in the paper: the distance.

    L = ||s - t||_2

    Args:
        student: maps of the student.
        teacher: maps of the teacher.
        where: mask of the examples or positions (*batch n) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        The same as that of `attention_transfer_loss_paper`.

    >>> student, teacher = jnp.array([0.6, 0.8]), jnp.array([1.0, 0.0])
    >>> attention_map_loss_paper(student, teacher)
    Array(0.894..., dtype=float32)
    """
    return norm(_error("attention_map_loss_paper", student, teacher, where))


def attention_transfer_loss(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape2 c2"],
    *,
    power: int = 2,
    attention: Callable[..., Float[Array, "..."]] = attention_map,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Attention transfer (AT): mean squared difference of the attention maps.

    L = mean_j (q_j(s) - q_j(t))^2,  q = attention_map

    Args:
        student: feature map of the student, (*batch *positions c): a map (h w), a
            sequence or tokens (n), or a volume (d h w).
        teacher: feature map of the teacher, of any size and channels; the larger of
            the two maps is averaged down to the size of the smaller.
        power: p, an integer >= 1.
        attention: makes the map of one network: `attention_map`, or
            `attention_map_code` for the signs of the code's odd powers.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        One value in [0, 2 / n] per example, for n positions; 0 for a fully masked
        example.

    Convention:
        For an even p, `.mean()` is the value that the authors' code and RepDistiller
        weight by beta = 1000, once for each pair of layers. For an odd p their code
        averages x^p (`attention=attention_map_code`), but the paper and this function
        average |x|^p; both agree on features >= 0. The value is
        ||q(s) - q(t)||^2 / n for n positions; the paper's Eq. 2 does not square the
        norm (`attention_transfer_loss_paper`).

    >>> student = jnp.array([[[1.0], [0.0]]])
    >>> attention_transfer_loss(student, student[:, ::-1])
    Array([1.], dtype=float32)

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, 2017.
        https://arxiv.org/abs/1612.03928
        https://github.com/szagoruyko/attention-transfer (utils.py)
        https://github.com/HobbitLong/RepDistiller (AT.py)
    """
    caller = "attention_transfer_loss"
    student, teacher = _maps(
        caller, student, teacher, power, attention, batch_dims, where
    )
    return attention_map_loss(student, teacher, where=_flat(where, student))


def attention_transfer_loss_paper(
    student: Float[Array, "*shape c"],
    teacher: Float[Array, "*shape2 c2"],
    *,
    power: int = 2,
    attention: Callable[..., Float[Array, "..."]] = attention_map,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Attention transfer (AT) as in the paper: distance of the attention maps.

    L = ||q(s) - q(t)||_2,  q = attention_map

    The slope of a distance stays the same however near the maps are, so at the end of
    training it follows rounding noise; the slope of the squared form goes to 0.

    Args:
        student: feature map of the student, (*batch *positions c): a map (h w), a
            sequence or tokens (n), or a volume (d h w).
        teacher: feature map of the teacher, of any size and channels; the larger of
            the two maps is averaged down to the size of the smaller.
        power: p, an integer >= 1.
        attention: makes the map of one network: `attention_map`, or
            `attention_map_code` for the signs of the code's odd powers.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        One value in [0, sqrt(2)] per example; 0 for a fully masked example.

    Convention:
        The paper's Eq. 2 without beta / 2. That factor is the weight of this term, once
        for each pair of layers.

    >>> student = jnp.array([[[1.0], [0.0]]])
    >>> attention_transfer_loss_paper(student, student[:, ::-1])
    Array([1.414...], dtype=float32)

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, 2017, Eq. 2.
        https://arxiv.org/abs/1612.03928
    """
    caller = "attention_transfer_loss_paper"
    student, teacher = _maps(
        caller, student, teacher, power, attention, batch_dims, where
    )
    return attention_map_loss_paper(student, teacher, where=_flat(where, student))


def _features(
    caller: str, features: Array, power: int, batch_dims: int, where: Array | None
) -> Array:
    """Returns the features of one network, checked, and 0 where masked."""
    features = as_float(caller, features)
    check_maps(caller, batch_dims, features=features)
    _checks.positive_int(caller, power=power)
    _checks.mask(caller, where, features.shape[:batch_dims], features.shape[:-1])
    return keep(features, where)


def _unit_map(energies: Array, batch_dims: int) -> Array:
    """Returns the mean over channels, flattened and divided by its norm."""
    energy = jnp.mean(energies, -1)
    return unit(energy.reshape(*energy.shape[:batch_dims], -1))


def _maps(
    caller: str,
    student: Array,
    teacher: Array,
    power: int,
    attention: Callable[..., Array],
    batch_dims: int,
    where: Array | None,
) -> tuple[Array, Array]:
    """Returns both attention maps at the smaller size; errors name the caller."""
    _checks.positive_int(caller, power=power)
    _checks.function(caller, attention=attention)
    student, teacher = on_one_grid(
        caller, batch_dims, where, student=student, teacher=teacher
    )
    hyper = {"power": power, "batch_dims": batch_dims, "where": where}
    return attention(student, **hyper), attention(teacher, **hyper)


def _flat(where: Array | None, maps: Array) -> Array | None:
    """Returns a mask of examples, or of positions in the flattened maps' shape."""
    if where is None or where.ndim < maps.ndim:
        return where
    return where.reshape(maps.shape)


def _error(caller: str, student: Array, teacher: Array, where: Array | None) -> Array:
    """Returns the student's map minus the teacher's, checked, 0 where masked."""
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 1, "*batch n", student=student)
    do = "attention_maps makes them of one length."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.mask(caller, where, student.shape[:-1], student.shape)
    return keep(student - teacher, where)
