"""Several processes as one run: what depends on a disk, a clock or a signal is agreed.

JAX runs one program in all processes, and a collective that one of them does not
reach holds up all others. So the first process owns whatever is on disk and tells the
others what they have to know; and what each sees for itself is put together before
anyone acts on it. Every process calls these functions, in the same order. Where there
is only one process, they cost nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintjax._checks import FileRefusal, Refusal, WrongType, message

# Errors that other processes raise as the kind that they were in the first.
_RAISED = (WrongType, FileRefusal, Refusal, ValueError, TypeError, OSError)
_SAID = 2000  # bytes of an error that others repeat


def first() -> bool:
    """Whether this process is the one that owns what is on disk."""
    return jax.process_index() == 0


def told(find: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """What the first process finds, in all of them.

    Args:
        find: called in the first process only; gives what JSON can hold.
        *kinds: errors that are to be the same in all, besides those below.

    Raises:
        ValueError, TypeError, OSError: what `find` raises, in all processes.
        RuntimeError: in the others, if it raises anything else.
    """
    if jax.process_count() == 1:
        return find()
    kinds = (*kinds, *_RAISED, RuntimeError)
    said = {"kind": len(kinds) - 1, "error": "the first process ended by an error"}
    try:
        if first():
            said = {"found": find()}
    except kinds as error:
        kind = next(i for i, kind in enumerate(kinds) if isinstance(error, kind))
        said = {"kind": kind, "error": str(error)}
        raise
    finally:
        said = _said(said)
    if "found" in said:
        return said["found"]
    raise kinds[said["kind"]](said["error"])


def each(find: Callable[[], Any]) -> Any:
    """What this process finds; if one of them raises, all do.

    Args:
        find: called in every process; must not wait for others.

    Raises:
        Exception: what `find` raises, here.
        ValueError: if it raises elsewhere, with what it said there.
    """
    if jax.process_count() == 1:
        return find()
    try:
        found = find()
    except Exception as error:
        _gathered(str(error) or repr(error))
        raise
    for process, text in _gathered("").items():
        wanted = f"process {process} to go on"
        raise Refusal(message("processes", wanted, text.rstrip(".")))
    return found


def _gathered(text: str) -> dict[int, str]:
    """What processes say, by their number, less those that say nothing."""
    text, ours = text.encode()[:_SAID], np.zeros(_SAID, np.uint8)
    ours[: len(text)] = np.frombuffer(text, np.uint8)
    all_of_them = multihost_utils.process_allgather(ours).astype(np.uint8)
    return {
        process: said.tobytes().rstrip(b"\0").decode(errors="replace")
        for process, said in enumerate(all_of_them)
        if said.any()
    }


def _said(what: Any) -> Any:
    """JSON of the first process, in all."""
    text = np.frombuffer(json.dumps(what).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = text if first() else np.zeros(size, np.uint8)
    return json.loads(_broadcast(text).tobytes())


def told_arrays(
    arrays: Sequence[np.ndarray] | None, kinds: Sequence[tuple[Sequence[int], Any]]
) -> list[np.ndarray]:
    """The arrays of the first process, in all of them, bit for bit.

    Args:
        arrays: in the first process; what others give is not looked at.
        kinds: their shapes and dtypes, which all know.
    """
    if jax.process_count() == 1:
        return list(arrays)
    found = []
    for i, (shape, dtype) in enumerate(kinds):
        if first():
            sent = np.ascontiguousarray(arrays[i]).reshape(-1).view(np.uint8)
        else:
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            sent = np.zeros(size, np.uint8)
        # As bytes: a sum with zeros would lose the sign of -0.0.
        got = _broadcast(sent) if sent.size else sent
        found.append(got.view(dtype).reshape(shape))
    return found


def _broadcast(data: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8)


def gather(array: jax.Array) -> np.ndarray:
    """An array that is split over the devices of several processes, whole in each."""
    return multihost_utils.process_allgather(array, tiled=True)


def largest(number: int) -> int:
    """The largest that any process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def agree(what: str, ours: Mapping[str, Any]) -> None:
    """Raises, in all processes, unless all have the same.

    Args:
        what: what is compared, for the message.
        ours: what this process has, by name; JSON.

    Raises:
        ValueError: naming the processes that differ from the first, and what differs.
    """
    if jax.process_count() == 1:
        return
    ours = json.loads(json.dumps(dict(ours)))
    theirs = told(lambda: ours)
    here = jax.process_index()
    shown = "\n  ".join(
        f"{name}: {theirs.get(name)!r} in process 0, {ours.get(name)!r} in {here}"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    )
    if said := _gathered(shown):
        others = ", ".join(map(str, said))
        got = f"another in process {others}:\n  " + "\n  ".join(said.values()) + "\n"
        do = "Start all processes with the same command."
        raise Refusal(message("processes", f"the same {what} in all", got, do))
