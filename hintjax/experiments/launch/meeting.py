"""The processes of a run meet, before JAX connects them.

While JAX connects processes, it names nobody, no error ends its wait early, and after
the wait it aborts. So the processes meet first, at the same address: each of them
sends its number to the first process. The first process says who is missing, and then
that all go on, or why all end. The connection of a process that is killed closes, so
that the others learn of it at once.

The messages are JSON, a line each. A process sends `[its number, number of processes]`.
The first process sends `["wait" or "end", a sentence]`, or `["go", ""]`.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from hintjax._checks import Refusal, message

# Seconds until the processes give up; until a sentence names the wait; between two of
# these sentences; and between two attempts to connect.
SECONDS, _QUIET, _AGAIN, _RETRY = 120.0, 5.0, 10.0, 0.2
_NAMED = 8  # processes that a sentence names at most
_LINE = 4096  # bytes of a message


def meet(coordinator: str, processes: int, process: int) -> None:
    """Returns when all processes are there.

    Args:
        coordinator: host:port of the first process.
        processes: number of processes.
        process: number of this process.

    Raises:
        Refusal: in every process that is there, with the same sentence, if a process is
            still missing after `SECONDS`, if a process leaves, if two processes have
            the same number, or if they were told different numbers of processes.
    """
    host, _, port = coordinator.rpartition(":")
    if process == 0:
        _Host(coordinator, processes).wait(int(port))
    else:
        _attend(coordinator, (host.strip("[]"), int(port)), processes, process)


class _Host:
    """The first process, to which the others come.

    Args:
        coordinator: its address, for messages.
        processes: number of processes.
    """

    def __init__(self, coordinator: str, processes: int) -> None:
        self._coordinator, self._processes = coordinator, processes
        self._missing = set(range(1, processes))
        self._there: dict[socket.socket, int] = {}
        self._sources = selectors.DefaultSelector()

    def wait(self, port: int) -> None:
        """Waits for all others at a port."""
        begun = time.monotonic()
        end, say = begun + SECONDS, begun + _QUIET
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._sources)
            door = stack.enter_context(_open(self._coordinator, port))
            self._sources.register(door, selectors.EVENT_READ)
            while self._missing:
                now = time.monotonic()
                if now >= end:
                    got = f"nothing from {_named(self._missing)}"
                    self._refuse(f"all {self._processes} within {SECONDS:g} s", got)
                if now >= say:
                    say = now + _AGAIN
                    self._tell("wait", _waiting(self._missing, self._coordinator))
                for key, _ in self._sources.select(min(end, say) - now):
                    if key.fileobj is door:
                        guest = stack.enter_context(door.accept()[0])
                        self._sources.register(guest, selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(key.fileobj)
            door.close()  # JAX takes the port
            self._tell("go", "")

    def _hear(self, source: socket.socket) -> None:
        """Reads the number of a process that came, or learns that it left."""
        try:
            said = source.recv(_LINE)
        except OSError:
            said = b""
        if source in self._there:
            number = self._there.pop(source)
            self._refuse(f"process {number} to wait for the others", "its end")
        try:
            number, processes = map(int, json.loads(said))
        except (TypeError, ValueError, OverflowError, RecursionError):
            self._sources.unregister(source)  # it is no process of a run
            source.close()
            return
        self._there[source] = number
        if processes != self._processes:
            got = f"{self._processes} in process 0 and {processes} in process {number}"
            self._refuse("the same number of processes in all", got)
        if number not in self._missing:
            self._refuse("processes of different numbers", f"process {number} twice")
        self._missing.remove(number)

    def _refuse(self, wanted: str, got: str) -> NoReturn:
        """Tells all that are there why they end, and ends."""
        do = "Start every process with its own --process and the same other options."
        sentence = message("processes", wanted, got, do)
        self._tell("end", sentence)
        raise Refusal(sentence)

    def _tell(self, what: str, sentence: str) -> None:
        """Sends a message to all that are there."""
        if what == "wait":
            _say(sentence)
        for guest in self._there:
            with contextlib.suppress(OSError):  # the next look finds that it left
                guest.sendall(json.dumps([what, sentence]).encode() + b"\n")


def _attend(
    coordinator: str, address: tuple[str, int], processes: int, process: int
) -> None:
    """Comes to the first process, and waits until it says that all are there."""
    end = time.monotonic() + SECONDS
    with _reached(coordinator, address, end) as connection:
        # The first process may have begun to wait later than this one.
        connection.settimeout(SECONDS + _QUIET)
        for what, sentence in _heard(connection, [process, processes]):
            if what == "go":
                return
            if what == "end":
                raise Refusal(sentence)
            _say(sentence)
    wanted = f"process 0 at {coordinator} to wait for the others"
    do = "Start it first, and look for its error."
    raise Refusal(message("processes", wanted, "its end", do))


def _heard(connection: socket.socket, hello: list[int]) -> Iterator[tuple[str, str]]:
    """Says the number of this process, and yields the messages of the first process.

    They end when the first process ends, or if another program has the port.
    """
    try:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        lines = connection.makefile("rb")
        while line := lines.readline(_LINE):
            what, sentence = json.loads(line)
            yield what, sentence
    except (OSError, TypeError, ValueError):
        return


def _reached(coordinator: str, address: tuple[str, int], end: float) -> socket.socket:
    """A connection to the first process, which may not have started yet."""
    say = time.monotonic() + _QUIET
    while True:
        try:
            return socket.create_connection(address, timeout=_QUIET)
        except OSError as error:
            now = time.monotonic()
            if now >= end:
                wanted = f"process 0 at {coordinator} within {SECONDS:g} s"
                do = "Start process 0, and give all processes its address."
                raise Refusal(message("processes", wanted, f"{error}", do)) from error
            if now >= say:
                say = now + _AGAIN
                _say(_waiting({0}, coordinator))
            time.sleep(_RETRY)


def _open(coordinator: str, port: int) -> socket.socket:
    """The port of the first process, for both kinds of addresses if there are two."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        wanted = f"a free port at {coordinator}"
        raise Refusal(message("processes", wanted, f"{error}")) from error


def _named(numbers: set[int]) -> str:
    """The numbers of processes, as text."""
    first, rest = sorted(numbers)[:_NAMED], len(numbers) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"process {', '.join(map(str, first))}{more}"


def _waiting(missing: set[int], coordinator: str) -> str:
    """The sentence that names a wait."""
    who = _named(missing)
    return f"waiting for {who} at {coordinator}. After {SECONDS:g} s it gives up."


def _say(sentence: str) -> None:
    print(f"processes: {sentence}", file=sys.stderr, flush=True)
