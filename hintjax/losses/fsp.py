"""Flow of solution procedure (FSP): matches the flow between two layers."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import (
    adaptive_average_pool,
    adaptive_max_pool,
    as_float,
    keep,
)
from hintjax.losses._positions import on_one_grid, positions, products


def fsp_matrix(
    first: Float[Array, "*shape m"],
    second: Float[Array, "*shape2 n"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch m n"]:
    """FSP matrix: inner products of the channels of two layers of one network.

    G_mn = mean_j F1_jm F2_jn,  j over the valid positions

    If the sizes differ, the larger map is averaged down to the smaller size, along each
    axis separately.

    Args:
        first: the map where the flow begins, (*batch *positions m): a map (h w), a
            sequence or tokens (n), or a volume (d h w).
        second: the map where the flow ends, of the same examples.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        One matrix per example; 0 for a fully masked example.

    Convention:
        The transpose of RepDistiller's matrix, whose rows belong to the second layer.
        The paper pools by the maximum (`fsp_matrix_paper`).

    >>> first = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> fsp_matrix(first, jnp.ones((1, 2, 1)))
    Array([[[2.],
            [3.]]], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 1.
        https://github.com/HobbitLong/RepDistiller (FSP.py)
    """
    pool = adaptive_average_pool
    return _matrix("fsp_matrix", first, second, batch_dims, where, pool)


def fsp_matrix_paper(
    first: Float[Array, "*shape m"],
    second: Float[Array, "*shape2 n"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch m n"]:
    """FSP matrix as in the paper: the larger map is pooled by the maximum.

    G_mn = mean_j F1_jm F2_jn,  j over the valid positions

    Args:
        first: the map where the flow begins, (*batch *positions m): a map (h w), a
            sequence or tokens (n), or a volume (d h w).
        second: the map where the flow ends, of the same examples.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples, or of the positions of the smaller map
            (*batch *positions), that count.

    Returns:
        One matrix per example; 0 for a fully masked example.

    Convention:
        The same as that of `fsp_matrix`, which is equal for two maps of the same size.
        The first of equal maxima in a window receives the gradient, as in torch.

    >>> first = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> fsp_matrix_paper(first, jnp.ones((1, 1, 1)))
    Array([[[3.],
            [4.]]], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 1.
    """
    pool = adaptive_max_pool
    return _matrix("fsp_matrix_paper", first, second, batch_dims, where, pool)


def fsp_matrix_loss(
    student: Float[Array, "*batch m n"],
    teacher: Float[Array, "*batch m n"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """FSP between matrices: the mean squared difference.

    L = mean_ij (S_ij - T_ij)^2

    This is the second half of `fsp_loss`. Matrices of the same shape can be stacked, so
    that many pairs of layers are compared at once.

    Args:
        student: FSP matrices of the student.
        teacher: FSP matrices of the teacher.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a masked example.

    Convention:
        The same as that of `fsp_loss`.

    >>> fsp_matrix_loss(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
    Array(2., dtype=float32)
    """
    error = _error("fsp_matrix_loss", student, teacher, where)
    return jnp.mean(jnp.square(error), (-2, -1))


def fsp_matrix_loss_paper(
    student: Float[Array, "*batch m n"],
    teacher: Float[Array, "*batch m n"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """FSP between matrices as in the paper: the squared Frobenius distance.

    L = sum_ij (S_ij - T_ij)^2

    Args:
        student: FSP matrices of the student.
        teacher: FSP matrices of the teacher.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a masked example.

    Convention:
        The value is m n times `fsp_matrix_loss`.

    >>> fsp_matrix_loss_paper(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]]))
    Array(4., dtype=float32)
    """
    error = _error("fsp_matrix_loss_paper", student, teacher, where)
    return jnp.sum(jnp.square(error), (-2, -1))


def fsp_loss(
    student: tuple[Float[Array, "*shape m"], Float[Array, "*shape2 n"]],
    teacher: tuple[Float[Array, "*shape3 m"], Float[Array, "*shape4 n"]],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Flow of solution procedure (FSP): mean squared difference of the FSP matrices.

    L = mean_ij (G_ij(s) - G_ij(t))^2,  G = fsp_matrix

    The matrices are products of activations, so L is quartic in the activations: if
    student and teacher differ in scale, begin with a small weight.

    Args:
        student: two maps of the student, where the flow begins and where it ends,
            (*batch *positions c).
        teacher: two maps of the teacher, of the same channels. The sizes of the four
            maps may differ.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples that count; or of the positions
            (*batch *positions), if the smaller map of both flows has this size.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is RepDistiller's term for one pair of layers; RepDistiller sums over
        pairs. The paper takes the sum over i and j, which is m n times the mean, and
        pools by the maximum (`fsp_loss_paper`).

    >>> one = jnp.ones((1, 2, 2, 1))
    >>> fsp_loss((one, one), (one, 3 * one))
    Array([4.], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 2.
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
        https://github.com/HobbitLong/RepDistiller (FSP.py)
    """
    flows = _flows("fsp_loss", student, teacher, batch_dims, where)
    pool = adaptive_average_pool
    return fsp_matrix_loss(*_matrices("fsp_loss", flows, batch_dims, where, pool))


def fsp_loss_paper(
    student: tuple[Float[Array, "*shape m"], Float[Array, "*shape2 n"]],
    teacher: tuple[Float[Array, "*shape3 m"], Float[Array, "*shape4 n"]],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """Flow of solution procedure (FSP) as in the paper: squared Frobenius distance.

    L = ||G(s) - G(t)||_F^2,  G = fsp_matrix_paper

    Args:
        student: two maps of the student, where the flow begins and where it ends,
            (*batch *positions c).
        teacher: two maps of the teacher, of the same channels. The sizes of the four
            maps may differ.
        batch_dims: number of leading axes over examples; the axes between them and the
            channels are positions.
        where: mask of the examples that count; or of the positions
            (*batch *positions), if the smaller map of both flows has this size.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the paper's Eq. 2 for one pair of layers with lambda = 1. For maps
        of the same size it is m n times `fsp_loss`.

    >>> one = jnp.ones((1, 2, 2, 1))
    >>> fsp_loss_paper((one, one), (one, 3 * one))
    Array([4.], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 2.
        https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
    """
    caller, pool = "fsp_loss_paper", adaptive_max_pool
    flows = _flows(caller, student, teacher, batch_dims, where)
    return fsp_matrix_loss_paper(*_matrices(caller, flows, batch_dims, where, pool))


def _matrix(
    caller: str,
    first: Array,
    second: Array,
    batch_dims: int,
    where: Array | None,
    pool: Callable[..., Array],
) -> Array:
    """Returns the matrix at the smaller of the two sizes."""
    first, second = on_one_grid(
        caller, batch_dims, where, pool, first=first, second=second
    )
    sums = products(keep(first, where), keep(second, where), batch_dims)
    if where is None or where.ndim == batch_dims:
        return sums / math.prod(first.shape[batch_dims:-1])
    number = jnp.sum(where.astype(sums.dtype), positions(first, batch_dims))
    return sums / jnp.maximum(number, 1)[..., None, None]


def _matrices(
    caller: str,
    flows: Sequence[tuple[Array, Array]],
    batch_dims: int,
    where: Array | None,
    pool: Callable[..., Array],
) -> list[Array]:
    """Returns the matrix of the student and the matrix of the teacher."""
    return [_matrix(caller, *flow, batch_dims, where, pool) for flow in flows]


def _flows(
    caller: str,
    student: Sequence[Array],
    teacher: Sequence[Array],
    batch_dims: int,
    where: Array | None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns both flows, checked; only the mask of positions is not checked yet."""
    for name, flow in {"student": student, "teacher": teacher}.items():
        if not isinstance(flow, Sequence) or isinstance(flow, str) or len(flow) != 2:
            wanted = f"{name} to be two maps"
            raise _checks.WrongType(
                _checks.message(caller, wanted, _checks.described(flow))
            )
    maps = as_float(caller, *student, *teacher)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    for x in maps:
        _checks.rank(caller, batch_dims + 2, "*batch *positions c", each_map=x)
    fixed = [(*x.shape[:batch_dims], x.ndim, x.shape[-1]) for x in maps]
    if fixed[:2] != fixed[2:] or fixed[0][:-1] != fixed[1][:-1]:
        shapes = [
            " and ".join(str(x.shape) for x in flow) for flow in (maps[:2], maps[2:])
        ]
        wanted = "student and teacher to have the same examples and channels"
        do = "Put a regressor between them (hintjax.regressors.linear)."
        got = f"student {shapes[0]}, teacher {shapes[1]}"
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    return (maps[0], maps[1]), (maps[2], maps[3])


def _error(caller: str, student: Array, teacher: Array, where: Array | None) -> Array:
    """Returns the student's matrix minus the teacher's, checked, 0 where masked."""
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 2, "*batch m n", student=student)
    do = "Give both networks the same channels with a regressor (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.mask(caller, where, student.shape[:-2])
    return keep(student - teacher, where)
