"""Standardization of a teacher's features: their statistics, six transforms, inverses.

The features of foundation models differ in scale by factors of 100, between models and
between channels. Under a squared error the features of large variance then decide what
the student learns. Each transform here is linear, so that its inverse gives the
student's predictions back in the teacher's space.

With the mean m, the covariance S = U diag(l) U^T of the features over examples and
positions, and an orthogonal matrix H with entries +-1 / sqrt(c) (a Hadamard matrix)::

    z = W (y - m)

    global_standardization     W = 1 / sqrt(tr S / c), m the mean of all entries
    channel_standardization    W = diag(S)^(-1/2)
    pca_whitening              W = diag(l)^(-1/2) U^T
    zca_whitening              W = U diag(l)^(-1/2) U^T
    hadamard_whitening         W = H diag(l)^(-1/2) U^T
    phi_standardization        W = sqrt(c / tr S) H U^T        (PHI-S)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks
from hintjax._numerics import as_float, keep
from hintjax.losses.hadamard import hadamard_matrix

HIGHEST = jax.lax.Precision.HIGHEST


class FeatureMoments(NamedTuple):
    """The first two moments of features; moments of parts can be merged.

    Attributes:
        count: number of feature vectors.
        mean: the mean of each channel.
        scatter: sum of (y - mean) (y - mean)^T over the vectors.
    """

    count: Float[Array, ""]
    mean: Float[Array, " c"]
    scatter: Float[Array, "c c"]


class Standardization(NamedTuple):
    """A linear transform of features, z = matrix (y - mean), and its inverse.

    The signs of eigenvectors are arbitrary, so another device can find another matrix
    for the same features: store the matrix with the student, do not estimate it again.

    Attributes:
        mean: the center m in the teacher's space.
        matrix: W.
        inverse: the pseudo-inverse of W.
    """

    mean: Float[Array, " c"]
    matrix: Float[Array, "c c"]
    inverse: Float[Array, "c c"]


def feature_moments(
    features: Float[Array, "*positions c"],
    *,
    where: Bool[Array, "..."] | None = None,
) -> FeatureMoments:
    """The moments of the features of a batch, over all examples and positions.

    Args:
        features: features of the teacher, channels last.
        where: mask of the examples or positions that count, over the first axes.

    Returns:
        The moments, in float32 (float64 for features in float64). Moments of no
        vectors are 0.

    >>> feature_moments(jnp.array([[1.0, 2.0], [3.0, 2.0]])).scatter
    Array([[2., 0.],
           [0., 0.]], dtype=float32)

    References:
        Ranzinger et al.: PHI-S: Distribution Balancing for Label-Free Multi-Teacher
        Distillation, 2024. https://arxiv.org/abs/2410.01680
    """
    features = as_float("feature_moments", features)
    _checks.rank("feature_moments", 2, "*positions c", features=features)
    shapes = (features.shape[:n] for n in range(1, features.ndim))
    _checks.mask("feature_moments", where, *shapes)
    rows = keep(features, where).reshape(-1, features.shape[-1])
    valid = keep(jnp.ones_like(features[..., :1]), where).reshape(-1, 1)
    count = jnp.sum(valid)
    mean = jnp.sum(rows, 0) / jnp.maximum(count, 1)
    centered = jnp.where(valid > 0, rows - mean[None], 0)
    return FeatureMoments(count, mean, _product(centered.T, centered))


def merge_moments(first: FeatureMoments, second: FeatureMoments) -> FeatureMoments:
    """The moments of two parts of the features together.

    With n the counts and d the difference of the means::

        mean = (n_1 m_1 + n_2 m_2) / n,  scatter = S_1 + S_2 + n_1 n_2 / n d d^T

    Args:
        first: the moments of one part.
        second: the moments of the other part, with as many channels.

    Returns:
        The moments of both parts.

    >>> parts = feature_moments(jnp.eye(2)[:1]), feature_moments(jnp.eye(2)[1:])
    >>> merge_moments(*parts).mean
    Array([0.5, 0.5], dtype=float32)

    References:
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing
        sample variances, 1979.
    """
    caller = "merge_moments"
    _checks.instance(caller, FeatureMoments, first=first, second=second)
    _checks.same_shape(caller, first=first.mean, second=second.mean)
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    apart = second.mean - first.mean
    between = first.count * share * apart[:, None] * apart[None, :]
    scatter = first.scatter + second.scatter + between
    return FeatureMoments(count, first.mean + share * apart, scatter)


def global_standardization(moments: FeatureMoments) -> Standardization:
    """One mean and one scale for all channels: z = (y - m) / s.

    m = mean_c m_c,  s^2 = (sum_i ||y_i - m||^2) / (n c - 1)

    Args:
        moments: the moments of the teacher's features, over n vectors.

    Returns:
        The transform; features without variance become 0.

    Convention:
        PHI-S, Eq. 5-8: m and s are the mean and the deviation of all entries.

    >>> same = global_standardization(feature_moments(jnp.array([[0.0, 2], [2, 4]])))
    >>> same.mean
    Array([2., 2.], dtype=float32)

    References:
        Ranzinger et al.: PHI-S, 2024. https://arxiv.org/abs/2410.01680
    """
    count, mean, scatter = _checked("global_standardization", moments)
    center = jnp.full_like(mean, jnp.mean(mean))
    total = jnp.trace(scatter) + count * jnp.sum(jnp.square(mean - center))
    variance = total / jnp.maximum(count * mean.shape[0] - 1, 1)
    return _scaled(center, jnp.full_like(mean, variance))


def channel_standardization(moments: FeatureMoments) -> Standardization:
    """A mean and a scale for each channel: z_c = (y_c - m_c) / s_c.

    Args:
        moments: the moments of the teacher's features.

    Returns:
        The transform; a channel without variance becomes 0.

    Convention:
        PHI-S, Eq. 9-12, with unbiased deviations. This is Theia's normalization, too.

    >>> rows = jnp.array([[0.0, 10.0], [2.0, 30.0], [4.0, 50.0]])
    >>> transform = channel_standardization(feature_moments(rows))
    >>> standardize_features(rows, transform)
    Array([[-1., -1.],
           [ 0.,  0.],
           [ 1.,  1.]], dtype=float32)

    References:
        Ranzinger et al.: PHI-S, 2024. https://arxiv.org/abs/2410.01680
        Shang et al.: Theia, 2024. https://arxiv.org/abs/2407.20179
    """
    moments = _checked("channel_standardization", moments)
    return _scaled(moments.mean, jnp.diagonal(_covariance(moments)))


def pca_whitening(moments: FeatureMoments) -> Standardization:
    """PCA whitening: the principal components, each with variance 1.

    W = diag(l)^(-1/2) U^T

    Args:
        moments: the moments of the teacher's features.

    Returns:
        The transform. The components are in ascending order of variance. Directions
        without variance, up to rounding, become 0.

    References:
        Ranzinger et al.: PHI-S, 2024, Eq. 19. https://arxiv.org/abs/2410.01680
    """
    moments = _checked("pca_whitening", moments)
    return _rotated(moments, lambda down, u: down[:, None] * u.T)


def zca_whitening(moments: FeatureMoments) -> Standardization:
    """ZCA whitening: covariance I, as near to the features as possible.

    W = U diag(l)^(-1/2) U^T

    Args:
        moments: the moments of the teacher's features.

    Returns:
        The transform. Directions without variance, up to rounding, become 0.

    References:
        Ranzinger et al.: PHI-S, 2024, Eq. 22. https://arxiv.org/abs/2410.01680
    """
    moments = _checked("zca_whitening", moments)
    return _rotated(moments, lambda down, u: _product(u * down[None], u.T))


def hadamard_whitening(moments: FeatureMoments) -> Standardization:
    """Hadamard whitening (HCA): covariance I, the same error in every channel.

    W = H diag(l)^(-1/2) U^T

    Args:
        moments: the moments of the teacher's features; `hadamard_matrix` must know
            their number of channels.

    Returns:
        The transform. Directions without variance, up to rounding, become 0.

    References:
        Ranzinger et al.: PHI-S, 2024, Eq. 26. https://arxiv.org/abs/2410.01680
    """
    moments = _checked("hadamard_whitening", moments)
    h = hadamard_matrix(moments.mean.shape[0]).astype(moments.mean.dtype)
    return _rotated(moments, lambda down, u: _product(h * down[None], u.T))


def phi_standardization(moments: FeatureMoments) -> Standardization:
    """PHI-S: a rotation after which all channels have variance 1, and one scale.

    W = sqrt(c / tr S) H U^T,  W^-1 = sqrt(tr S / c) U H^T

    Unlike whitening it keeps the relative size of the principal components, so
    directions of little variance, which are mostly noise, are not enlarged.

    Args:
        moments: the moments of the teacher's features; `hadamard_matrix` must know
            their number of channels.

    Returns:
        The transform; features without variance become 0.

    Convention:
        The matrix of the authors' code, up to the signs of eigenvectors. For a number
        of channels without a known Hadamard matrix, the code rotates by a random
        matrix, and the variances are then unequal; this function raises.

    >>> rows = jax.random.normal(jax.random.key(0), (99, 4)) * jnp.arange(1.0, 5)
    >>> z = standardize_features(rows, phi_standardization(feature_moments(rows)))
    >>> z.std(0, ddof=1).round(3)
    Array([1., 1., 1., 1.], dtype=float32)

    References:
        Ranzinger et al.: PHI-S: Distribution Balancing for Label-Free Multi-Teacher
        Distillation, 2024, Eq. 45-50. https://arxiv.org/abs/2410.01680
        https://github.com/NVlabs/RADIO (examples/common/phi_s.py)
    """
    moments = _checked("phi_standardization", moments)
    covariance = _covariance(moments)
    _, u = jnp.linalg.eigh(covariance)
    h = hadamard_matrix(u.shape[0]).astype(u.dtype)
    rotation = _product(h, u.T)
    down, up = _scales(jnp.trace(covariance) / u.shape[0])
    return Standardization(moments.mean, down * rotation, up * rotation.T)


def standardize_features(
    features: Float[Array, "*positions c"], transform: Standardization
) -> Float[Array, "*positions c"]:
    """The teacher's features, standardized: z = W (y - m).

    Args:
        features: features of the teacher, channels last.
        transform: the transform.

    Returns:
        The standardized features, which the student is to predict.
    """
    caller = "standardize_features"
    mean, matrix, _, features = _on(caller, features, transform)
    mean = jnp.expand_dims(mean, range(features.ndim - 1))
    return _product(features - mean, matrix.T)


def restore_features(
    features: Float[Array, "*positions c"], transform: Standardization
) -> Float[Array, "*positions c"]:
    """Standardized features in the teacher's space again: y = W^-1 z + m.

    The student's predictions of standardized features can so be used in place of the
    teacher's features.

    Args:
        features: standardized features, or predictions of them, channels last.
        transform: the transform.

    Returns:
        The features in the teacher's space.

    Convention:
        To fold this map into the student's last linear layer y = x K + b (as Flax has
        it): `kernel = K @ transform.inverse.T` and `bias = restore_features(b, ...)`.

    >>> rows = jnp.array([[0.0, 10.0], [2.0, 30.0], [4.0, 50.0]])
    >>> transform = channel_standardization(feature_moments(rows))
    >>> restore_features(standardize_features(rows, transform), transform)
    Array([[ 0., 10.],
           [ 2., 30.],
           [ 4., 50.]], dtype=float32)
    """
    mean, _, inverse, features = _on("restore_features", features, transform)
    mean = jnp.expand_dims(mean, range(features.ndim - 1))
    return _product(features, inverse.T) + mean


def layer_normalize(
    features: Float[Array, "*positions c"], *, eps: float = 1e-5
) -> Float[Array, "*positions c"]:
    """Layer norm without parameters: mean 0 and variance 1 over the channels.

    z = (y - mean_c y) / sqrt(mean_c (y - mean_c y)^2 + eps)

    It needs no statistics, but it cannot be inverted: each vector loses its own mean
    and scale.

    Args:
        features: features of the teacher, channels last.
        eps: a small variance > 0, which bounds the gradient; torch's by default.

    Returns:
        The normalized features.

    >>> layer_normalize(jnp.array([[1.0, 3.0], [5.0, 5.0]])).round(3)
    Array([[-1.,  1.],
           [ 0.,  0.]], dtype=float32)

    References:
        Miles, Elezi, Deng: VkD: Improving Knowledge Distillation using Orthogonal
        Projections, 2024. https://arxiv.org/abs/2403.06213
    """
    features = as_float("layer_normalize", features)
    _checks.rank("layer_normalize", 1, "*positions c", features=features)
    _checks.positive("layer_normalize", eps=eps)
    centered = features - jnp.mean(features, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), -1, keepdims=True)
    return centered / jnp.sqrt(variance + jnp.asarray(eps, features.dtype))


def _checked(caller: str, moments: FeatureMoments) -> FeatureMoments:
    """Returns the moments, or raises."""
    _checks.instance(caller, FeatureMoments, moments=moments)
    return moments


def _covariance(moments: FeatureMoments) -> Array:
    """Returns the unbiased covariance."""
    return moments.scatter / jnp.maximum(moments.count - 1, 1)


def _scales(variance: Array, least: Array | float = 0.0) -> tuple[Array, Array]:
    """Returns 1 / sqrt(v) and sqrt(v); both are 0 if v is not above the least."""
    known = variance > least
    up = jnp.sqrt(jnp.where(known, variance, 1))
    return jnp.where(known, 1 / up, 0), jnp.where(known, up, 0)


def _scaled(mean: Array, variance: Array) -> Standardization:
    """Returns the transform that divides each channel by its deviation."""
    down, up = _scales(variance)
    return Standardization(mean, jnp.diag(down), jnp.diag(up))


def _rotated(
    moments: FeatureMoments, matrix: Callable[[Array, Array], Array]
) -> Standardization:
    """Returns a whitening transform: `matrix` of the scales of components, and U.

    An orthogonal matrix R turns the whitened components, W = R diag(d) U^T. With
    1 / d in place of d, its transpose is the inverse, U diag(1 / d) R^T.
    """
    variance, u = jnp.linalg.eigh(_covariance(moments))
    # Variances below the rounding error of the largest one are noise of the solver.
    noise = u.shape[0] * jnp.finfo(u.dtype).eps * jnp.max(variance)
    down, up = _scales(variance, noise)
    return Standardization(moments.mean, matrix(down, u), matrix(up, u).T)


def _on(
    caller: str, features: Array, transform: Standardization
) -> tuple[Array, Array, Array, Array]:
    """Returns mean, matrix, inverse and features, checked, in one dtype."""
    _checks.instance(caller, Standardization, transform=transform)
    features, mean, matrix, inverse = as_float(caller, features, *transform)
    _checks.rank(caller, 1, "*positions c", features=features)
    if features.shape[-1] != mean.shape[-1]:
        wanted = f"features of {mean.shape[-1]} channels"
        do = "Estimate the transform on features of the same layer."
        got = f"{features.shape}"
        raise _checks.Refusal(_checks.message(caller, wanted, got, do))
    return mean, matrix, inverse, features


def _product(first: Array, second: Array) -> Array:
    """Returns the matrix product at full precision on every device."""
    return jnp.matmul(first, second, precision=HIGHEST)
