"""Several processes as one run: what depends on a disk, a clock or a signal is agreed.

JAX runs one program in all processes, and a collective that one of them does not
reach holds up all others. So the first process owns whatever is on disk and tells the
others what they have to know; and what each sees for itself is put together before
anyone acts on it. Every process calls these functions, in the same order. Where there
is only one process, they cost nothing.
"""

import collections
import contextlib
import glob
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintjax._checks import message

_RAISED = (ValueError, TypeError, OSError)  # what is raised as what it was elsewhere
# Seconds: until a silent process counts as lost (JAX's own 100 s are dear, and threads
# of its own say that a process is there); until it is said what is waited for; that all
# are waited for, at the start; and that others are, after an error.
_LOST, _QUIET, _STARTING, _LEAVING = 30, 5, 300, 10
_SAID = 2000  # bytes of an error that others repeat


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Makes this process one of several, before anything is computed in it.

    On the hosts of a Cloud TPU nothing has to be said. One process on such a host,
    and any process elsewhere that is told nothing, stays alone.

    If one is lost later, JAX ends the others within half a minute, and names it.

    Args:
        coordinator: host:port of the first process; the same in all.
        processes: how many there are.
        process: which this is, from 0.

    Raises:
        ValueError: if only some of the three are given, or do not go together; if
            something was computed before; or if processes differ in their number of
            devices.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _on_tpu():
            try:
                jax.distributed.initialize(heartbeat_timeout_seconds=_LOST)
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
    with _waiting(f"all {processes} at {coordinator}; this is process {process}"):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=_STARTING,
                heartbeat_timeout_seconds=_LOST,
            )
        except RuntimeError as error:
            wanted = "to start, once and before anything is computed"
            raise ValueError(message("processes", wanted, f"{error}")) from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        got = f"{dict(sorted(counts.items()))}"
        wanted = "as many devices in each process"
        raise ValueError(message("processes", wanted, got))


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Says what is waited for, if that takes long, and lets Ctrl-C end it."""

    def say():
        text = f"processes: waiting for {what}. After {_STARTING} s it gives up."
        print(text, file=sys.stderr, flush=True)

    timer = threading.Timer(_QUIET, say)
    timer.daemon = True
    timer.start()
    main = threading.current_thread() is threading.main_thread()
    # The wait is not in Python, whose own handler would be called after it only.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends this process soon after an error in the block, though others may not know.

    At its end JAX would wait minutes for the others, which may wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        last = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        last.start()
        last.join(_LEAVING)
        if not last.is_alive():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


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
        raise ValueError(message("processes", wanted, text.rstrip(".")))
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
        raise ValueError(message("processes", f"the same {what} in all", got, do))
