"""Hadamard matrices, which turn features so that all channels have one variance."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hintjax import _checks


def hadamard_matrix(size: int) -> Float[Array, "size size"]:
    """An orthogonal matrix whose entries are all +-1 / sqrt(size).

    The Kronecker product of Sylvester's matrix of the largest possible size with one of
    Paley's two constructions.

    Args:
        size: number of rows.

    Returns:
        The matrix, in float32 (float64 if JAX is set to it).

    Raises:
        ValueError: if neither construction gives a matrix of this size: 1, 2, and most
            multiples of 4 have one (not 92, 116, 156 and others).

    >>> 2**0.5 * hadamard_matrix(2)
    Array([[ 0.99999994,  0.99999994],
           [ 0.99999994, -0.99999994]], dtype=float32)

    References:
        Paley: On orthogonal matrices, 1933.
    """
    _checks.positive_int("hadamard_matrix", size=size)
    twos = (size & -size).bit_length() - 1
    if size == 1 << twos:
        rows = [[1]]
    else:
        found = (_paley(size >> power) for power in range(twos - 1, -1, -1))
        rows = next(filter(None, found), None)
    if rows is None:
        wanted = "a size for which a Hadamard matrix is known here"
        do = "Use the standardization by channels, or whitening by PCA or ZCA."
        raise _checks.Refusal(_checks.message("hadamard_matrix", wanted, f"{size}", do))
    matrix, two = jnp.array(rows, float), jnp.array([[1.0, 1.0], [1.0, -1.0]])
    while matrix.shape[0] < size:
        matrix = jnp.kron(two, matrix)
    return matrix / size**0.5


def _paley(size: int) -> list[list[int]] | None:
    """Paley's Hadamard matrix of entries +-1, or None if he has none of this size."""
    if _prime(size - 1) and (size - 1) % 4 == 3:
        core = _core(size - 1, border=-1)
        return [
            [entry + (i == j) for j, entry in enumerate(row)]
            for i, row in enumerate(core)
        ]
    q = size // 2 - 1
    if size % 2 == 0 and _prime(q) and q % 4 == 1:
        blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
        core = _core(q, border=1)
        return [
            [n for entry in row for n in blocks[entry][half]]
            for row in core
            for half in (0, 1)
        ]
    return None


def _core(q: int, border: int) -> list[list[int]]:
    """Squares modulo q (1), others (-1) and 0, at i - j, with a first row of 1."""
    squares = {i * i % q for i in range(1, q)}
    sign = [0] + [1 if i in squares else -1 for i in range(1, q)]
    inner = [[border, *(sign[(i - j) % q] for j in range(q))] for i in range(q)]
    return [[0] + [1] * q, *inner]


def _prime(n: int) -> bool:
    """Whether n is a prime number."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
