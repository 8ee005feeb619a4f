"""Hint loss (FitNets): matches the activations themselves."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep, masked_mean


def hint_loss(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """FitNets hint loss: mean squared error of the regressed guided layer.

    L = mean_i (s_i - t_i)^2,  i over all features of one example

    Args:
        student: the guided layer after its regressor, of any rank.
        teacher: the hint layer, of the same shape.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        `.mean()` is the MSE that RepDistiller and its descendants weight by 100. With N
        features per example, FitNets' Eq. 3 (`hint_loss_paper`) is N / 2 times this
        value. The FitNets code gives R / 2 times this value: it sums over one axis,
        which is the R rows of the map in its maxout layers, and the channels in other
        layers.

        For tokens (*batch n c), with their padding mask as `where`, this is TinyBERT's
        loss of hidden states, and TextBrewer's hid_mse. TextBrewer takes the mean over
        all tokens of a batch at once; here each example has the same weight, whatever
        its length.

    >>> student = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> hint_loss(student, jnp.zeros((2, 2)))
    Array([ 2.5, 12.5], dtype=float32)

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, Eq. 3.
        https://arxiv.org/abs/1412.6550
        https://github.com/HobbitLong/RepDistiller (FitNet.py)
        https://github.com/adri-romsor/FitNets (HintCost.py)
        Jiao et al.: TinyBERT, 2020. https://arxiv.org/abs/1909.10351
    """
    error = _error("hint_loss", student, teacher, batch_dims, where)
    return masked_mean(jnp.square(error), where, batch_dims)


def hint_loss_paper(
    student: Float[Array, "*shape"],
    teacher: Float[Array, "*shape"],
    *,
    batch_dims: int = 1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch"]:
    """FitNets hint loss as in the paper: half the squared distance.

    L = 1/2 sum_i (s_i - t_i)^2,  i over all features of one example

    Args:
        student: the guided layer after its regressor, of any rank.
        teacher: the hint layer, of the same shape.
        batch_dims: number of leading axes over examples; all others are features.
        where: mask of the examples (shape of the leading axes) or the positions (all
            axes but the last, the channels) that count.

    Returns:
        One value >= 0 per example; 0 for a fully masked example.

    Convention:
        FitNets' Eq. 3. The value grows with the number N of features: it is N / 2 times
        `hint_loss`.

    >>> student = jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    >>> hint_loss_paper(student, jnp.zeros((2, 3)))
    Array([1.5, 6. ], dtype=float32)

    References:
        Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, Eq. 3.
        https://arxiv.org/abs/1412.6550
    """
    error = _error("hint_loss_paper", student, teacher, batch_dims, where)
    return jnp.sum(jnp.square(error), tuple(range(batch_dims, error.ndim))) / 2


def _error(
    caller: str, student: Array, teacher: Array, batch_dims: int, where: Array | None
) -> Array:
    """Returns student minus teacher, checked, and 0 where masked."""
    student, teacher = as_float(caller, student, teacher)
    do = "Put a regressor between them (hintjax.regressors)."
    _checks.same_shape(caller, student=student, teacher=teacher, do=do)
    _checks.integer(caller, 0, batch_dims=batch_dims)
    _checks.rank(caller, batch_dims, "*batch *features", student=student)
    _checks.mask(caller, where, student.shape[:batch_dims], student.shape[:-1])
    return keep(student - teacher, where)
