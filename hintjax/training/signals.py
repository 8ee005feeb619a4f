"""Signals that ask a run to end: noticed at once, obeyed when the run is saved."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_PATIENCE = 1.0  # seconds; many senders send a signal twice at once


class Request:
    """The signal, if any, that has asked the loops of this process to end."""

    def __init__(self):
        self.signal: int | None = None

    def obey(self, saved: str) -> None:
        """Raises the exception that ends the run, if a signal has asked for that.

        It is KeyboardInterrupt after SIGINT. After SIGTERM it is SystemExit, with the
        code that shells give to a process that SIGTERM ended.

        Args:
            saved: says what is saved, as the text of the KeyboardInterrupt.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(saved)
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


# The request to the loop in the main thread, the only thread that may install handlers.
# Loops that it started in other threads look at the same request.
_CURRENT: list[Request] = []


@contextlib.contextmanager
def stoppable() -> Iterator[Request]:
    """Takes SIGINT and SIGTERM as requests until the block ends.

    A second signal, more than a moment later, does at once what it did before the
    block. Ignored signals stay ignored. A handler that the caller has installed is
    called when the block ends.

    Yields:
        The request. Code that has saved the run calls its `obey`.
    """
    if _CURRENT or threading.current_thread() is not threading.main_thread():
        yield _CURRENT[0] if _CURRENT else Request()
        return
    request, before, first = Request(), {}, [0.0]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
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
        request.obey("all is saved")  # for a signal after the last step
    finally:
        _CURRENT.clear()
        restore()
        handler = before.get(request.signal)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(request.signal, None)
