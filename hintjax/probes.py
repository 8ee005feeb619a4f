"""Evaluation of features without training a head: k-NN and a closed-form linear probe.

Both are pure functions of features that are computed once, with the network frozen.
`jnp.argmax` of the scores is the predicted class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from hintjax import _checks
from hintjax._numerics import as_float, unit
from hintjax.losses import FeatureMoments, feature_moments

HIGHEST = jax.lax.Precision.HIGHEST


class LinearProbe(NamedTuple):
    """A linear classifier: scores = features @ kernel + bias.

    Attributes:
        kernel: (c, targets).
        bias: (targets,).
    """

    kernel: Float[Array, "c targets"]
    bias: Float[Array, " targets"]


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
        known: features with known classes, such as those of the training set.
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
    if not features.ndim == known.ndim == 2 or features.shape[1] != known.shape[1]:
        wanted = "features (n, c) and known (m, c)"
        got = f"{features.shape} and {known.shape}"
        do = "Pool maps and tokens first."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
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


def probe_moments(
    features: Float[Array, "n c"],
    targets: Float[Array, "n targets"],
    *,
    where: Bool[Array, " n"] | None = None,
) -> FeatureMoments:
    """The moments of features and targets, which `ridge_probe` needs.

    `hintjax.losses.merge_moments` merges the moments of batches, so that the features
    of a training set need not be stored.

    Args:
        features: features of the frozen network.
        targets: what to predict: `jax.nn.one_hot(labels, classes)` for classes.
        where: mask of the examples that count.

    Returns:
        The moments of both, side by side.
    """
    caller = "probe_moments"
    features, targets = as_float(caller, features, targets)
    if not features.ndim == targets.ndim == 2 or len(features) != len(targets):
        wanted = "features (n, c) and targets (n, targets)"
        got = f"{features.shape} and {targets.shape}"
        do = "Give jax.nn.one_hot(labels, classes) for classes."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    _checks.mask(caller, where, features.shape[:1])
    return feature_moments(jnp.concatenate([features, targets], 1), where=where)


def ridge_probe(
    moments: FeatureMoments, *, targets: int, penalty: ScalarLike
) -> LinearProbe:
    """A linear probe in closed form: ridge regression on the targets.

    kernel, bias = argmin sum_i ||K^T x_i + b - y_i||^2 + penalty ||K||^2

    Choose the penalty on a validation set, from powers of 10 for example: each costs
    one solution, not another pass over the features. `jax.vmap` solves for many.

    Args:
        moments: the moments of features and targets (`probe_moments`).
        targets: number of targets, such as classes.
        penalty: the penalty > 0, scikit-learn's `alpha`; the bias has none. A traced
            value is not checked.

    Returns:
        The probe.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
    >>> y = jax.nn.one_hot(jnp.array([0, 0, 1, 1]), 2)
    >>> probe = ridge_probe(probe_moments(x, y), targets=2, penalty=1e-3)
    >>> jnp.argmax(x @ probe.kernel + probe.bias, -1)
    Array([0, 0, 1, 1], dtype=int32)

    References:
        Hoerl, Kennard: Ridge Regression: Biased Estimation for Nonorthogonal Problems,
        1970.
    """
    caller = "ridge_probe"
    _checks.instance(caller, FeatureMoments, moments=moments)
    _checks.positive_int(caller, targets=targets)
    _checks.positive(caller, penalty=penalty)
    c = moments.mean.shape[0] - targets
    if c < 1:
        wanted = "moments of features and of all targets"
        got = f"{moments.mean.shape[0]} columns for {targets} targets"
        do = "Make them with probe_moments."
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    scatter = moments.scatter
    ridge = jnp.asarray(penalty, scatter.dtype) * jnp.eye(c, dtype=scatter.dtype)
    kernel = jax.scipy.linalg.solve(
        scatter[:c, :c] + ridge, scatter[:c, c:], assume_a="pos"
    )
    center = jnp.matmul(moments.mean[:c], kernel, precision=HIGHEST)
    return LinearProbe(kernel, moments.mean[c:] - center)
