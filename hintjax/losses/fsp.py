"""Flow of solution procedure (FSP): matches the flow between two layers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import (
    adaptive_average_pool,
    adaptive_max_pool,
    as_float,
    keep,
)


def fsp_matrix(
    first: Float[Array, "*batch h w m"], second: Float[Array, "*batch h2 w2 n"]
) -> Float[Array, "*batch m n"]:
    """FSP matrix: inner products of the channels of two layers of one network.

    G_ij = 1 / (h w) sum_xy F1_xyi F2_xyj

    If the sizes differ, the larger map is averaged down to the smaller size, along each
    axis separately.

    Args:
        first: the map where the flow begins.
        second: the map where the flow ends, of the same examples.

    Returns:
        One matrix per example.

    Convention:
        The transpose of RepDistiller's matrix, whose rows belong to the second layer.
        The paper pools by the maximum (`fsp_matrix_paper`).

    >>> first = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> fsp_matrix(first, jnp.ones((2, 1, 1)))
    Array([[2.],
           [3.]], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 1.
        https://github.com/HobbitLong/RepDistiller (FSP.py)
    """
    return _matrix("fsp_matrix", first, second, adaptive_average_pool)


def fsp_matrix_paper(
    first: Float[Array, "*batch h w m"], second: Float[Array, "*batch h2 w2 n"]
) -> Float[Array, "*batch m n"]:
    """FSP matrix as in the paper: the larger map is pooled by the maximum.

    G_ij = 1 / (h w) sum_xy F1_xyi F2_xyj

    Args:
        first: the map where the flow begins.
        second: the map where the flow ends, of the same examples.

    Returns:
        One matrix per example.

    Convention:
        The same as that of `fsp_matrix`, which is equal for two maps of the same size.
        The first of equal maxima in a window receives the gradient, as in torch.

    >>> first = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> fsp_matrix_paper(first, jnp.ones((1, 1, 1)))
    Array([[3.],
           [4.]], dtype=float32)

    References:
        Yim et al.: A Gift from Knowledge Distillation, 2017, Eq. 1.
    """
    return _matrix("fsp_matrix_paper", first, second, adaptive_max_pool)


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
    student: tuple[Float[Array, "*batch h w m"], Float[Array, "*batch h2 w2 n"]],
    teacher: tuple[Float[Array, "*batch h3 w3 m"], Float[Array, "*batch h4 w4 n"]],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Flow of solution procedure (FSP): mean squared difference of the FSP matrices.

    L = mean_ij (G_ij(s) - G_ij(t))^2,  G = fsp_matrix

    The matrices are products of activations, so L is quartic in the activations: if
    student and teacher differ in scale, begin with a small weight.

    Args:
        student: two maps of the student, where the flow begins and where it ends.
        teacher: two maps of the teacher, of the same channels. The heights and widths
            of the four maps may differ.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a masked example.

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
    student, teacher = _flows("fsp_loss", student, teacher, where)
    return fsp_matrix_loss(fsp_matrix(*student), fsp_matrix(*teacher))


def fsp_loss_paper(
    student: tuple[Float[Array, "*batch h w m"], Float[Array, "*batch h2 w2 n"]],
    teacher: tuple[Float[Array, "*batch h3 w3 m"], Float[Array, "*batch h4 w4 n"]],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Flow of solution procedure (FSP) as in the paper: squared Frobenius distance.

    L = ||G(s) - G(t)||_F^2,  G = fsp_matrix_paper

    Args:
        student: two maps of the student, where the flow begins and where it ends.
        teacher: two maps of the teacher, of the same channels. The heights and widths
            of the four maps may differ.
        where: mask of the examples that count.

    Returns:
        One value >= 0 per example; 0 for a masked example.

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
    student, teacher = _flows("fsp_loss_paper", student, teacher, where)
    return fsp_matrix_loss_paper(fsp_matrix_paper(*student), fsp_matrix_paper(*teacher))


def _matrix(
    caller: str, first: Array, second: Array, pool: Callable[..., Array]
) -> Array:
    """Returns the matrix at the smaller of the two sizes."""
    first, second = as_float(caller, first, second)
    _checks.rank(caller, 3, "*batch h w c", first=first, second=second)
    _checks.same_leading(caller, 3, first=first, second=second)
    size = tuple(map(min, first.shape[-3:-1], second.shape[-3:-1]))
    first, second = pool(first, size), pool(second, size)
    precision = jax.lax.Precision.HIGHEST
    products = jnp.einsum("...hwm,...hwn->...mn", first, second, precision=precision)
    return products / (size[0] * size[1])


def _flows(
    caller: str,
    student: Sequence[Array],
    teacher: Sequence[Array],
    where: Array | None,
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns both flows, checked, and 0 at masked examples."""
    for name, flow in {"student": student, "teacher": teacher}.items():
        if not isinstance(flow, Sequence) or isinstance(flow, str) or len(flow) != 2:
            wanted = f"{name} to be two maps"
            raise _checks.WrongType(
                _checks.message(caller, wanted, _checks.described(flow))
            )
    maps = as_float(caller, *student, *teacher)
    for x in maps:
        _checks.rank(caller, 3, "*batch h w c", each_map=x)
    fixed = [(*x.shape[:-3], x.shape[-1]) for x in maps]
    if fixed[:2] != fixed[2:] or maps[0].shape[:-3] != maps[1].shape[:-3]:
        shapes = [
            " and ".join(str(x.shape) for x in flow) for flow in (maps[:2], maps[2:])
        ]
        wanted = "student and teacher to have the same examples and channels"
        do = "Put a regressor between them (hintjax.regressors.linear)."
        got = f"student {shapes[0]}, teacher {shapes[1]}"
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    _checks.mask(caller, where, maps[0].shape[:-3])
    kept = [keep(x, where) for x in maps]
    return (kept[0], kept[1]), (kept[2], kept[3])


def _error(caller: str, student: Array, teacher: Array, where: Array | None) -> Array:
    """Returns the student's matrix minus the teacher's, checked, 0 where masked."""
    student, teacher = as_float(caller, student, teacher)
    _checks.rank(caller, 2, "*batch m n", student=student)
    do = "Give both networks the same channels with a regressor (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.mask(caller, where, student.shape[:-2])
    return keep(student - teacher, where)
