"""Which tokens count: the batch's padding mask, read and checked in one place."""

from collections.abc import Mapping

from jaxtyping import Array, Bool

from hintjax._checks import Refusal, message


def counted(
    caller: str, batch: Mapping[str, Array], padding: str | None
) -> Bool[Array, " batch"] | Bool[Array, "batch n"] | None:
    """What a loss is told as `where`: the valid examples, or their valid tokens.

    Args:
        caller: the method.
        batch: its "where", if any, says which examples are valid.
        padding: the name of the batch's mask of tokens, bool (batch, n), True where a
            token counts; None if all do.

    Returns:
        The mask of examples or of tokens; None if everything counts.

    Raises:
        ValueError: in the caller's name, if the batch has no such mask.
    """
    where = batch.get("where")
    if padding is None:
        return where
    if padding not in batch:
        do = "Name the mask of the tokens that count with padding=."
        raise Refusal(
            message(caller, f"{padding!r} in the batch", f"{sorted(batch)}", do)
        )
    mask = batch[padding]
    if mask.dtype != bool or mask.ndim != 2:
        wanted = f"{padding!r} of the batch to be bool (batch, n)"
        do = "True is a token that counts."
        raise Refusal(message(caller, wanted, f"{mask.dtype} {mask.shape}", do))
    return mask if where is None else mask & where[:, None]
