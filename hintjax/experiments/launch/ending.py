"""Before training, processes end together: a process that ends alone tells the others.

A process that fails before training, or that a signal ends, would leave the others in a
wait for it. So it writes its reason into the store of JAX's coordination service. Every
process looks there from a thread of its own, since its main thread may be in a wait
outside Python, which nothing can interrupt. Once training has begun, the loop itself
agrees on signals and errors, and the watch is over.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, NoReturn

import jax

from hintjax.processes import each

_ENDED, _LEFT = "hintjax/ended/", "hintjax/left/"  # keys in the store
# Seconds between two looks into the store; until a main thread that does not end by
# itself is left behind; and until the first process, which has the store, ends.
_LOOK, _GRACE, _LAST = 0.5, 2.0, 10.0
_STOPS = (signal.SIGINT, signal.SIGTERM)
_CURRENT: "list[Watch]" = []


class Watch:
    """Looks for the end of other processes, and tells them the end of this process.

    Args:
        client: client of JAX's coordination service.
        process: number of this process.
        processes: number of processes.
    """

    def __init__(self, client: Any, process: int, processes: int) -> None:
        self._client, self._process, self._processes = client, process, processes
        self._over, self._signal = threading.Event(), 0
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._main = threading.current_thread() is threading.main_thread()

    def start(self) -> None:
        """Starts to look; SIGTERM becomes an exception, as SIGINT is already."""
        if self._main:
            # Python writes the signal here even if the main thread is in a wait.
            wakeup = self._writer.fileno()
            self._wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            self._before = signal.signal(signal.SIGTERM, _stop)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()
        if self._main:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._before)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LAST)

    def end(self, error: BaseException) -> NoReturn:
        """Tells the others the error that ends this process, and ends it."""
        self.stop()
        if not isinstance(error, SystemExit) and (found := self._others()):
            # A wait for a process that has left ends by an error, which says less.
            self._follow(*found)
        code = error.code if isinstance(error, SystemExit) else 1
        code = code if isinstance(code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sentence = self._sentence(error, code)
        if self._signal:
            print(f"hintjax: {sentence}", file=sys.stderr)
        self._tell(sentence, code)
        self._leave(code)

    def _sentence(self, error: BaseException, code: int) -> str:
        """The reason of the end, in words."""
        here = f"process {self._process}"
        if code - 128 in _STOPS:
            self._signal = code - 128
            return f"{here} was stopped by {signal.Signals(code - 128).name}"
        if isinstance(error, SystemExit):
            return f"{error.__cause__ or f'{here} ended with the exit code {code}'}"
        return f"{here} ended by {type(error).__name__}: {error}"

    def _look(self) -> None:
        """Ends this process soon after another process ended, or after a signal."""
        while not self._over.is_set():
            found = self._news()
            if found is None or self._over.wait(_GRACE):
                continue
            self._follow(*found)

    def _follow(self, sentence: str, code: int) -> NoReturn:
        """Ends this process for the reason and with the exit code of another."""
        print(f"hintjax: {sentence}", file=sys.__stderr__)
        self._leave(code)

    def _news(self) -> tuple[str, int] | None:
        """The end of this or of another process: its reason and its exit code."""
        ready, _, _ = select.select([self._reader], [], [], _LOOK)
        if ready and (number := self._reader.recv(1)[0]) in _STOPS:
            code = 128 + number
            sentence = self._sentence(SystemExit(code), code)
            self._tell(sentence, code)
            return sentence, code
        return self._others()

    def _others(self) -> tuple[str, int] | None:
        """The end of another process: its reason and its exit code."""
        for key, text in self._stored(_ENDED):
            if key.rpartition("/")[2] != str(self._process):
                return tuple(json.loads(text))
        return None

    def _tell(self, sentence: str, code: int) -> None:
        self._store(_ENDED, json.dumps([sentence, code]))

    def _leave(self, code: int) -> NoReturn:
        """Ends this process, whatever its main thread does."""
        self._store(_LEFT, "")
        end = time.monotonic() + _LAST
        # The service ends with the first process, so the others go before it.
        while self._process == 0 and time.monotonic() < end:
            if len(self._stored(_LEFT)) == self._processes:
                break
            time.sleep(_LOOK / 5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _store(self, key: str, text: str) -> None:
        """Writes the text of this process; without a service nobody is told."""
        try:
            self._client.key_value_set(f"{key}{self._process}", text, True)
        except RuntimeError as error:
            print(f"hintjax: nobody could be told: {error}", file=sys.__stderr__)

    def _stored(self, key: str) -> list[tuple[str, str]]:
        """The texts of all processes; none without a service, which ends JAX, too."""
        try:
            return self._client.key_value_dir_get(key)
        except RuntimeError:
            return []


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the main thread by an exception, after SIGTERM."""
    raise SystemExit(128 + number)


def watch() -> None:
    """Begins to look for the end of other processes; with one process, does nothing."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    # JAX has no public access to the store of its service.
    from jax._src import distributed

    client = distributed.global_state.client
    _CURRENT.append(Watch(client, jax.process_index(), jax.process_count()))
    _CURRENT[-1].start()


def training_begins() -> None:
    """Waits until every process has come here; from then on, the watch is over."""
    if _CURRENT:
        each(lambda: None)
        _CURRENT.pop().stop()


def watched() -> Watch | None:
    """The watch of this process, which then is over; None if there is none."""
    return _CURRENT.pop() if _CURRENT else None
