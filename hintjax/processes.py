"""Several processes as one run: what depends on a disk, a clock or a signal is agreed.

JAX runs one program in all processes, and a collective that one of them does not
reach holds up all others. So the first process owns whatever is on disk and tells the
others what they have to know; and what each sees for itself is put together before
anyone acts on it. Every process calls these functions, in the same order. Where there
is only one process, they cost nothing.
"""

import glob
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintjax._checks import message

_RAISED = (ValueError, TypeError, OSError)  # what is raised as what it was elsewhere


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Makes this process one of several, before anything is computed in it.

    On the hosts of a Cloud TPU nothing has to be said. One process on such a host,
    and any process elsewhere that is told nothing, stays alone.

    Args:
        coordinator: host:port of the first process; the same in all.
        processes: how many there are.
        process: which this is, from 0.

    Raises:
        ValueError: if only some of the three are given, or do not go together.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _on_tpu():
            try:
                jax.distributed.initialize()
            except (ValueError, RuntimeError, OSError) as error:
                print(f"one host: {str(error).partition(chr(10))[0]}")
        return
    if missing:
        got = f"no {' and no '.join(missing)}"
        raise ValueError(message("processes", "all of " + ", ".join(given), got))
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        wanted = "coordinator as host:port"
        raise ValueError(message("processes", wanted, repr(coordinator)))
    if not 0 <= process < processes:
        wanted = f"process in 0..{processes - 1}"
        raise ValueError(message("processes", wanted, f"{process}"))
    jax.distributed.initialize(coordinator, processes, process)


def _on_tpu() -> bool:
    """Whether this host has TPUs; looked up without starting them."""
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


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
        ValueError: naming the processes that differ from the first, and in these what
            differs.
    """
    if jax.process_count() == 1:
        return
    ours = json.loads(json.dumps(dict(ours)))
    theirs = told(lambda: ours)
    differ = multihost_utils.process_allgather(np.int32(ours != theirs))
    if not differ.any():
        return
    others = ", ".join(str(i) for i in np.flatnonzero(differ))
    got = f"another in process {others}"
    if ours != theirs:
        shown = [
            f"{name}: {theirs.get(name)!r} in process 0, {ours.get(name)!r} here"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        got = "\n  ".join([f"{got}:", *shown]) + "\n"
    do = "Start all processes with the same command."
    raise ValueError(message("processes", f"the same {what} in all", got, do))
