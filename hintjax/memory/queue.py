"""A queue of embeddings of the examples seen last, newest first.

A queue is an array (size, features). A fresh one is zeros.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hintjax import _checks


def enqueue(
    queue: Float[Array, "size features"],
    embeddings: Float[Array, "batch features"],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, "size features"]:
    """The queue with the embeddings of a batch in front; the oldest rows leave it.

    No gradient passes. If the batch is larger than the queue, its first examples stay.

    Args:
        queue: the queue.
        embeddings: the embeddings of the batch, in order.
        where: the examples that count; the others do not enter.

    Returns:
        The new queue.

    >>> enqueue(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[4.0], [5.0]]))
    Array([[4.],
           [5.],
           [1.]], dtype=float32)
    """
    arrays = {"queue": queue, "embeddings": embeddings}
    for name, array in arrays.items():
        if not _checks.is_array(array) or array.ndim != 2:
            wanted = f"{name} to be (rows, features)"
            got = _checks.described(array)
            raise _checks.Refusal(_checks.message("enqueue", wanted, got))
    if queue.shape[1] != embeddings.shape[1]:
        wanted = "queue and embeddings to have as many features"
        got = f"{queue.shape} and {embeddings.shape}"
        raise _checks.Refusal(_checks.message("enqueue", wanted, got))
    batch, size = embeddings.shape[0], queue.shape[0]
    _checks.mask("enqueue", where, (batch,))
    rows = jax.lax.stop_gradient(embeddings).astype(queue.dtype)
    both = jnp.concatenate([rows, queue])
    if where is None:
        return both[:size]
    # The valid examples first, in order, then the queue.
    valid = jnp.concatenate([where, jnp.ones(size, bool)])
    return both[jnp.argsort(~valid, stable=True)[:size]]
