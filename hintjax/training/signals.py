"""Signals that ask a run to end: noticed between steps, obeyed once all is saved."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

_PATIENCE = 1.0  # seconds; what sends a signal often sends it twice at once


class Request:
    """Which signal has asked the loops of this process to end, if any has."""

    def __init__(self):
        self.signal: int | None = None

    def obey(self, saved: str) -> None:
        """Raises, if it was asked: after SIGINT KeyboardInterrupt, after SIGTERM the
        SystemExit whose code shells give to a process that ended by it.

        Args:
            saved: what is safe, for whoever reads the KeyboardInterrupt.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


# Of the loop in the main thread, which alone may install handlers. Loops that it
# started in other threads look at the same one.
_CURRENT: list[Request] = []


@contextlib.contextmanager
def stoppable() -> Iterator[Request]:
    """Takes SIGINT and SIGTERM as requests until the block ends.

    A second one, a moment later, does what it did before, at once. Signals that are
    ignored stay ignored, and a handler of the caller's is called when the block ends.

    Yields:
        The request; whoever has saved what must not be lost calls its `obey`.
    """
    if _CURRENT or threading.current_thread() is not threading.main_thread():
        yield _CURRENT[0] if _CURRENT else Request()
        return
    request, before, first = Request(), {}, [0.0]

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number, frame):
        if request.signal is None:
            request.signal, first[0] = number, time.monotonic()
        elif time.monotonic() - first[0] > _PATIENCE:
            restore()
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN):
            before[number] = handler
            signal.signal(number, ask)
    _CURRENT.append(request)
    try:
        yield request
        request.obey("all is saved")  # it came when there was nothing left to do
    finally:
        _CURRENT.clear()
        restore()
        handler = before.get(request.signal)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(request.signal, None)
