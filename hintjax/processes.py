"""Several processes as one run: they agree on what comes from disk, clock or signals.

JAX runs one program in all processes, and a collective that one process does not
reach blocks all others. So process 0 owns all files and broadcasts their content,
and the processes share what each one sees before any of them acts on it. Every
process calls these functions in the same order. With only one process, they cost
nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintjax._checks import FileRefusal, Refusal, WrongType, message

# Errors that the other processes raise with the type that they have in process 0.
_RAISED = (WrongType, FileRefusal, Refusal, ValueError, TypeError, OSError)
_SAID = 2000  # bytes of an error message that are sent to other processes


def first() -> bool:
    """Whether this is process 0, which owns all files."""
    return jax.process_index() == 0


def told(find: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """Runs `find` in process 0 and broadcasts its result.

    Args:
        find: called in process 0 only; its result must be JSON.
        *kinds: more types of errors that all processes raise, besides those below.

    Raises:
        ValueError, TypeError, OSError: what `find` raises, in all processes.
        RuntimeError: in the other processes, if `find` raises any other error.
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
    """Runs `find` in every process; if one process raises, all processes raise.

    Args:
        find: must not wait for other processes.

    Raises:
        Exception: what `find` raises in this process.
        ValueError: if `find` raises in another process, with the message from there.
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
    """The texts of all processes by process number, without the empty ones."""
    sent, ours = text.encode()[:_SAID], np.zeros(_SAID, np.uint8)
    ours[: len(sent)] = np.frombuffer(sent, np.uint8)
    all_of_them = multihost_utils.process_allgather(ours).astype(np.uint8)
    return {
        process: said.tobytes().rstrip(b"\0").decode(errors="replace")
        for process, said in enumerate(all_of_them)
        if said.any()
    }


def _said(what: Any) -> Any:
    """Broadcasts a JSON value from process 0."""
    text = np.frombuffer(json.dumps(what).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = text if first() else np.zeros(size, np.uint8)
    return json.loads(_broadcast(text).tobytes())


def told_arrays(
    arrays: Sequence[np.ndarray] | None, kinds: Sequence[tuple[Sequence[int], Any]]
) -> list[np.ndarray]:
    """Broadcasts the arrays of process 0, bit for bit.

    Args:
        arrays: the arrays of process 0; ignored in the other processes.
        kinds: the shape and dtype of each array, known in every process.
    """
    ours = arrays or ()
    if jax.process_count() == 1:
        return list(ours)
    found = []
    for i, (shape, dtype) in enumerate(kinds):
        if first():
            sent = np.ascontiguousarray(ours[i]).reshape(-1).view(np.uint8)
        else:
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            sent = np.zeros(size, np.uint8)
        # As bytes: a sum with zeros would lose the sign of -0.0.
        got = _broadcast(sent) if sent.size else sent
        found.append(got.view(dtype).reshape(shape))
    return found


def _broadcast(data: np.ndarray) -> np.ndarray:
    """The bytes of process 0."""
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8)


def gather(array: jax.Array) -> np.ndarray:
    """An array sharded over several processes, gathered whole in each process."""
    return multihost_utils.process_allgather(array, tiled=True)


def largest(number: int) -> int:
    """The largest number of all processes."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def agree(what: str, ours: Mapping[str, Any]) -> None:
    """Raises, in all processes, unless their values are the same.

    Args:
        what: a name for the values, for the message.
        ours: the values of this process by name; JSON.

    Raises:
        ValueError: names the processes that differ from process 0, and the values.
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
