"""The mask of a batch: which positions are valid and which are padding."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool

from hintjax._checks import Refusal, message, needed


def counted(
    caller: str, batch: Mapping[str, Array], padding: str | None
) -> Bool[Array, "batch ..."] | None:
    """The mask `where` of a loss: the valid examples, or their valid positions.

    Args:
        caller: the name of the method, for messages.
        batch: the batch. Its "where", if present, is the mask of valid examples.
        padding: the name of the mask of positions in the batch: bool (batch,
            *positions), True for a valid token or pixel. None if all are valid.

    Returns:
        The mask of examples or of positions; None if everything is valid.

    Raises:
        ValueError: if the batch has no such mask. The message names the caller.
    """
    if padding is None:
        return batch.get("where")
    return masked(caller, batch, padding)


def masked(
    caller: str, batch: Mapping[str, Array], padding: str
) -> Bool[Array, "batch ..."]:
    """The mask of the valid positions of the valid examples; see `counted`."""
    do = "Pass the name of the mask of valid positions as padding=."
    mask = needed(caller, batch, padding, do)
    if mask.dtype != bool or mask.ndim < 2:
        wanted = f"{padding!r} of the batch to be bool (batch, *positions)"
        do = "True marks a valid position."
        raise Refusal(message(caller, wanted, f"{mask.dtype} {mask.shape}", do))
    where = batch.get("where")
    if where is None:
        return mask
    return mask & jnp.expand_dims(where, range(1, mask.ndim))
