"""The token mask of a batch: which tokens are valid and which are padding."""

from collections.abc import Mapping

from jaxtyping import Array, Bool

from hintjax._checks import Refusal, message, needed


def counted(
    caller: str, batch: Mapping[str, Array], padding: str | None
) -> Bool[Array, " batch"] | Bool[Array, "batch n"] | None:
    """The mask `where` of a loss: the valid examples, or their valid tokens.

    Args:
        caller: the name of the method, for messages.
        batch: the batch. Its "where", if present, is the mask of valid examples.
        padding: the name of the token mask in the batch: bool (batch, n), True for a
            valid token. None if all tokens are valid.

    Returns:
        The mask of examples or of tokens; None if everything is valid.

    Raises:
        ValueError: if the batch has no such mask. The message names the caller.
    """
    where = batch.get("where")
    if padding is None:
        return where
    do = "Pass the name of the token mask as padding=."
    mask = needed(caller, batch, padding, do)
    if mask.dtype != bool or mask.ndim != 2:
        wanted = f"{padding!r} of the batch to be bool (batch, n)"
        do = "True marks a valid token."
        raise Refusal(message(caller, wanted, f"{mask.dtype} {mask.shape}", do))
    return mask if where is None else mask & where[:, None]
