"""Evaluation of features without training a head: weighted k-NN, linear probe.

Both are pure functions of features that are computed once, with the network frozen. The
linear probe is ridge regression on the classes as one-hot vectors, in closed form.
Choose the ridge on a validation set; `hintjax probe` does. Features that do not fit
into memory are summed batch by batch (`hintjax.similarity`):

>>> from hintjax.similarity import add_moments, begin_moments, linear_map
>>> features, labels = jnp.arange(8.0).reshape(4, 2), jnp.array([0, 0, 1, 1])
>>> targets = jax.nn.one_hot(labels, 2)
>>> moments = add_moments(begin_moments(2, 2), features, targets)
>>> weights, bias = linear_map(moments, ridge=1e-3)
>>> jnp.argmax(features @ weights + bias, -1)
Array([0, 0, 1, 1], dtype=int32)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, unit
from hintjax.similarity import add_moments, begin_moments, linear_map

HIGHEST = jax.lax.Precision.HIGHEST


def knn_scores(
    features: Float[Array, "n c"],
    known: Float[Array, "m c"],
    labels: Int[Array, " m"],
    *,
    classes: int,
    k: int = 20,
    temperature: ScalarLike = 0.07,
) -> Float[Array, "n classes"]:
    """Weighted k-NN: the k nearest known features vote for their classes.

    score_c = log sum_i exp(cos(x, y_i) / T) [label_i = c],  i over the k nearest

    Args:
        features: features to classify. Call the function on batches: it keeps the
            similarities of a batch to all known features.
        known: features with known classes, such as features of the training set.
        labels: the class of each known feature, from 0 to classes - 1.
        classes: number of classes.
        k: number of neighbors, at most m. Of equally near ones the first count.
        temperature: T > 0; a smaller T gives near neighbors more weight. A traced value
            is not checked.

    Returns:
        The logarithm of the votes for each class; -inf for a class without votes.

    Raises:
        ValueError: if k is larger than m, or a label is not a class.

    Convention:
        The votes of DINO's `eval_knn.py`, which UNIC and RADIO use too, with k = 20.

    >>> known = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> labels = jnp.array([0, 1, 1])
    >>> scores = knn_scores(known[:2] * 9, known, labels, classes=2, k=1)
    >>> jnp.argmax(scores, -1)
    Array([0, 1], dtype=int32)

    References:
        Caron et al.: Emerging Properties in Self-Supervised Vision Transformers, 2021.
        https://github.com/facebookresearch/dino (eval_knn.py)
    """
    caller = "knn_scores"
    features, known = as_float(caller, features, known)
    _checks.positive_int(caller, classes=classes, k=k)
    _checks.positive(caller, temperature=temperature)
    _check_rows(caller, features, known)
    _checks.labels(caller, known.shape[:1], labels=labels)
    if k > known.shape[0]:
        wanted = f"k up to the {known.shape[0]} known features"
        raise _checks.Refusal(_checks.message(caller, wanted, f"{k}"))
    if _checks.on_host(labels) and not 0 <= labels.min() <= labels.max() < classes:
        got = f"{labels.min()}..{labels.max()}"
        wanted = f"labels in 0..{classes - 1}"
        raise _checks.Refusal(_checks.message(caller, wanted, got))
    cosines = jnp.matmul(unit(features), unit(known).T, precision=HIGHEST)
    near, index = jax.lax.top_k(cosines, k)
    temperature = jnp.asarray(temperature, near.dtype)
    # Relative to the nearest, so that no exponential overflows.
    votes = jnp.exp((near - near[:, :1]) / temperature)
    rows = jnp.arange(features.shape[0])[:, None]
    blank = jnp.zeros((features.shape[0], classes), near.dtype)
    counted = blank.at[rows, jnp.asarray(labels)[index]].add(votes, mode="drop")
    return jnp.log(counted) + near[:, :1] / temperature


def linear_scores(
    features: Float[Array, "n c"],
    known: Float[Array, "m c"],
    labels: Int[Array, " m"],
    *,
    classes: int,
    ridge: ScalarLike = 0.01,
    where: Bool[Array, " m"] | None = None,
) -> Float[Array, "n classes"]:
    """Linear probe: ridge regression of known features on one-hot vectors.

    score = W^T x + b,  W = (Y^T Y + ridge t I)^-1 Y^T L,  t = tr(Y^T Y) / c

    with the known features Y and the one-hot labels L centered.

    Args:
        features: features to classify.
        known: features with known classes, such as those of the training set.
        labels: the class of each known feature, from 0 to classes - 1.
        classes: number of classes.
        ridge: the penalty, in mean variances of a feature, >= 0; see
            `hintjax.similarity.linear_map`. A traced value is not checked.
        where: mask of the known features that count; by default all.

    Returns:
        The score of each class; the largest one decides.

    Raises:
        ValueError: if the shapes do not belong together, or the ridge is < 0.

    >>> known, labels = jnp.arange(8.0).reshape(4, 2), jnp.array([0, 0, 1, 1])
    >>> jnp.argmax(linear_scores(known, known, labels, classes=2), -1)
    Array([0, 0, 1, 1], dtype=int32)
    """
    caller = "linear_scores"
    features, known = as_float(caller, features, known)
    _checks.positive_int(caller, classes=classes)
    _check_rows(caller, features, known)
    _checks.labels(caller, known.shape[:1], labels=labels)
    targets = jax.nn.one_hot(labels, classes, dtype=known.dtype)
    moments = begin_moments(known.shape[1], classes)
    moments = add_moments(moments, known, targets, where=where)
    weights, bias = linear_map(moments, ridge=ridge)
    return jnp.matmul(features, weights, precision=HIGHEST) + bias[None]


def _check_rows(caller: str, features: Array, known: Array) -> None:
    """Raises unless both have rows of one width."""
    if not features.ndim == known.ndim == 2 or features.shape[1] != known.shape[1]:
        wanted = "features (n, c) and known (m, c)"
        got = f"{features.shape} and {known.shape}"
        do = "Pool maps and tokens first."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
