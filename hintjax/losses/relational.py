"""Relational knowledge distillation (RKD): matches the geometry of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax._numerics import keep, norm, unit
from hintjax.losses._batch import count, counted, vectors

# Two examples nearer than this fraction of the mean distance have no direction to
# learn: its gradient, one over their distance, would dominate all others.
NEAR = 1e-4


def distance_loss(
    student: Float[Array, "batch ..."],
    teacher: Float[Array, "batch ..."],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Distance-wise relational loss (RKD-D): the distances between examples match.

    L_i = mean_j l(d_ij(s) - d_ij(t)),  d_ij = ||f_i - f_j|| / m

    with the smooth L1 norm `l(x) = x^2 / 2` for |x| < 1 and |x| - 1/2 beyond. m is
    the mean distance of two different examples, for each network separately.

    Args:
        student: embeddings of the student, of any size.
        teacher: embeddings of the teacher, of the same examples, of any size.
        where: mask of the examples that count; the loss of the others is 0, and no
            example is compared with them.

    Returns:
        One value >= 0 per anchor i; 0 in a batch of one.

    Convention:
        `.mean()` is the value that RepDistiller weights by 25: the mean is over all B^2
        pairs, including the B pairs of an example with itself. Distances are at least
        1e-6, as in RepDistiller, so equal examples have equal distances; smaller
        distances have no gradient. For a batch of one the loss is 0, and the code gives
        nan.

    >>> student = jnp.array([[0.0], [1.0], [2.0]])
    >>> distance_loss(student, 5 * student)
    Array([0., 0., 0.], dtype=float32)

    References:
        Park et al.: Relational Knowledge Distillation, 2019.
        https://arxiv.org/abs/1904.05068
        https://github.com/HobbitLong/RepDistiller (RKD.py)
    """
    student, teacher = vectors("distance_loss", student, teacher, where)
    valid = counted(student, where)
    error = _distances(student, valid) - _distances(teacher, valid)
    return keep(jnp.sum(_smooth(error), 1) / count(valid, error), where)


def angle_loss(
    student: Float[Array, "batch ..."],
    teacher: Float[Array, "batch ..."],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Angle-wise relational loss (RKD-A): the angles between examples match.

    L_i = mean_jk l(a_ijk(s) - a_ijk(t)),  a_ijk = cos of the angle of j, i, k at i

    with the smooth L1 norm l of `distance_loss`. All differences between examples
    are in memory at once, batch x batch x features: use this loss on pooled features.

    Args:
        student: embeddings of the student, of any size.
        teacher: embeddings of the teacher, of the same examples, of any size.
        where: mask of the examples that count; the loss of the others is 0, and no
            example is compared with them.

    Returns:
        One value in [0, 3/2] per anchor i; 0 in a batch of one.

    Convention:
        `.mean()` is the value that RepDistiller weights by 50: the mean is over all B^3
        triples, including triples that repeat an example, whose cosine is 0. The
        direction between duplicates is 0 too. The direction between examples nearer
        than 1e-4 of the mean distance has no gradient; in the code it has a gradient of
        3e11.

    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> angle_loss(student, jnp.eye(3))
    Array([0.0277..., 0.0047..., 0.0047...], dtype=float32)

    References:
        Park et al.: Relational Knowledge Distillation, 2019.
        https://arxiv.org/abs/1904.05068
        https://github.com/HobbitLong/RepDistiller (RKD.py)
    """
    student, teacher = vectors("angle_loss", student, teacher, where)
    valid = counted(student, where)
    error = _angles(student, valid) - _angles(teacher, valid)
    kept = _pairs(valid)[:, :, None] & valid[None, None, :]
    total = jnp.sum(jnp.where(kept, _smooth(error), 0), (1, 2))
    return keep(total / count(valid, error) ** 2, where)


def _smooth(x: Array) -> Array:
    """Returns the smooth L1 norm of each entry."""
    size = jnp.abs(x)
    return jnp.where(size < 1, jnp.square(x) / 2, size - 0.5)


def _pairs(valid: Array) -> Array:
    """Returns the mask of the pairs of two valid and different examples."""
    return valid[:, None] & valid[None, :] & ~jnp.eye(len(valid), dtype=bool)


def _differences(rows: Array) -> Array:
    """Returns f_j - f_i; a Gram matrix would cancel for near examples."""
    return rows[None, :, :] - rows[:, None, :]


def _distances(rows: Array, valid: Array) -> Array:
    """Returns distances over their mean; 0 except between the valid pairs."""
    pairs = _pairs(valid)
    square = jnp.sum(jnp.square(_differences(rows)), -1)
    near = square <= 1e-12
    distance = jnp.where(near, 1e-6, jnp.sqrt(jnp.where(near, 1, square)))
    distance = jnp.where(pairs, distance, 0)
    mean = jnp.sum(distance) / count(pairs, distance)
    return distance / jnp.where(jnp.any(pairs), mean, 1)


def _angles(rows: Array, valid: Array) -> Array:
    """Returns cosines at i (first axis) between the directions to j and k."""
    differences = _differences(rows)
    pairs = _pairs(valid)
    length = jnp.where(pairs, norm(jax.lax.stop_gradient(differences)), 0)
    near = length < NEAR * jnp.sum(length) / count(pairs, length)
    direction = unit(differences)
    fixed = jax.lax.stop_gradient(direction)
    direction = jnp.where(near[:, :, None], fixed, direction)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ijn,ikn->ijk", direction, direction, precision=highest)
