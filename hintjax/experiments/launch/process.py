"""The start and the end of one process among several."""

import collections
import contextlib
import glob
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

from hintjax._checks import Refusal, message, positive_int
from hintjax.experiments.launch.ending import watched
from hintjax.experiments.launch.meeting import meet

# Seconds until a silent process counts as lost (the default of JAX, 100 s, is costly,
# and JAX's own threads report that a process lives); until the connection gives up on
# processes that have met; and until an error gives up on other processes.
_LOST, _CONNECTING, _LEAVING = 30, 60, 10


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Makes this process one of several, before anything is computed in it.

    On the hosts of a Cloud TPU no argument is needed. A single process on such a host,
    and any process elsewhere without arguments, stays alone.

    The processes meet first (`meeting`): after a few seconds a sentence names those
    that are missing, and if a process ends, all end. If a process is lost later, JAX
    ends the others within half a minute and names it.

    Args:
        coordinator: host:port of the first process; the same in all processes.
        processes: number of processes.
        process: number of this process, from 0.

    Raises:
        Refusal: if only some of the three are given, or do not fit together; if
            something was computed before; if a process is missing or ends; or if
            processes differ in their number of devices.
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
    if coordinator is None or processes is None or process is None:
        got = f"no {' and no '.join(missing)}"
        raise Refusal(message("processes", "all of " + ", ".join(given), got))
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        wanted = "coordinator as host:port"
        raise Refusal(message("processes", wanted, repr(coordinator)))
    positive_int("processes", processes=processes)
    if not 0 <= process < processes:
        wanted = f"process in 0..{processes - 1}"
        raise Refusal(message("processes", wanted, f"{process}"))
    once = "to start, once and before anything is computed"
    if jax.distributed.is_initialized():
        raise Refusal(message("processes", once, "a second start"))
    meet(coordinator, processes, process)
    with _connecting(f"all {processes} at {coordinator}"):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=2 * _CONNECTING,
                heartbeat_timeout_seconds=_LOST,
            )
        except RuntimeError as error:
            raise Refusal(message("processes", once, f"{error}")) from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        got = f"{dict(sorted(counts.items()))}"
        wanted = "as many devices in each process"
        raise Refusal(message("processes", wanted, got))


@contextlib.contextmanager
def _connecting(whom: str) -> Iterator[None]:
    """Ends this process if the block takes too long, and lets Ctrl-C end it.

    A process that is killed inside the block leaves the others in JAX's wait, which is
    outside Python, and which JAX itself ends by an abort.
    """

    def give_up() -> None:
        wanted, got = f"{whom} to connect", f"no answer within {_CONNECTING} s"
        do = "Look for the error of the process that ended."
        print(f"hintjax: {message('processes', wanted, got, do)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(_CONNECTING, give_up)
    timer.daemon = True
    timer.start()
    main = threading.current_thread() is threading.main_thread()
    # Python's own handler would run only after the wait.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends this process soon after an error in the block.

    Otherwise JAX waits minutes for the other processes, which may wait for this one.
    Before training, the other processes are told, and end too.
    """
    try:
        yield
    except BaseException as error:
        if (watch := watched()) is not None:
            watch.end(error)
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
    else:
        if (watch := watched()) is not None:
            watch.stop()


def _on_tpu() -> bool:
    """Whether this host has TPUs; the check does not start them."""
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None
