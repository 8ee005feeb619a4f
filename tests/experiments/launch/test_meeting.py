"""The processes of a run meet; each test has its processes in threads."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hintjax import Refusal
from hintjax.experiments.launch import meeting

pytestmark = pytest.mark.quick


@pytest.fixture
def coordinator():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"


def met(coordinator, *processes):
    """What each `(number of processes, process)` found: None, or why it ended."""

    def one(pair):
        try:
            return meeting.meet(coordinator, *pair)
        except Refusal as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(one, processes))


def guest(coordinator, said):
    """A connection to the first process, as soon as it is there."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection((host, int(port)))
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)
    connection.sendall(said)
    return connection


def test_all_go_on_when_all_are_there(coordinator):
    assert met(coordinator, (3, 2), (3, 0), (3, 1)) == [None] * 3
    # The port is free at once, for JAX.
    assert met(coordinator, (2, 1), (2, 0)) == [None] * 2


def test_one_process_waits_for_nobody(coordinator):
    assert met(coordinator, (1, 0)) == [None]


def test_a_process_that_is_missing_is_named(coordinator, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SECONDS", 2)
    monkeypatch.setattr(meeting, "_QUIET", 0.2)
    monkeypatch.setattr(meeting, "_AGAIN", 0.2)
    with ThreadPoolExecutor(1) as thread:
        host = thread.submit(met, coordinator, (4, 0))
        with guest(coordinator, b"[2, 4]") as other:
            *waits, (what, sentence) = map(json.loads, other.makefile())
        (found,) = host.result(timeout=60)
    assert (what, sentence) == ("end", found)
    wanted = "processes: expected all 4 within 2 s, got nothing from process 1, 3. "
    assert found.startswith(wanted)
    said = f"waiting for process 1, 3 at {coordinator}. After 2 s it gives up."
    assert ["wait", said] in waits
    assert f"processes: {said}\n" in capsys.readouterr().err


def test_the_first_process_is_missing(coordinator, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SECONDS", 0.6)
    monkeypatch.setattr(meeting, "_QUIET", 0.3)
    (found,) = met(coordinator, (2, 1))
    assert f"expected process 0 at {coordinator} within 0.6 s, got " in found
    assert "waiting for process 0 at" in capsys.readouterr().err


def test_a_process_that_ends_while_it_waits_ends_all(coordinator):
    with ThreadPoolExecutor(1) as thread:
        host = thread.submit(met, coordinator, (4, 0))
        with guest(coordinator, b"[1, 4]") as other:
            guest(coordinator, b"[2, 4]").close()
            found = json.loads(other.makefile().readline())
        assert host.result(timeout=60) == [found[1]]
    assert found[0] == "end"
    wanted = "processes: expected process 2 to wait for the others, got its end. "
    assert found[1].startswith(wanted)


def test_the_end_of_the_first_process_ends_all(coordinator):
    host, _, port = coordinator.rpartition(":")
    with ThreadPoolExecutor(1) as thread:
        with socket.create_server((host, int(port))) as door:
            others = thread.submit(met, coordinator, (3, 1))
            door.accept()[0].close()
        (found,) = others.result(timeout=60)
    assert f"expected process 0 at {coordinator} to wait for the others" in found


def test_processes_of_two_runs_end(coordinator):
    first, second = met(coordinator, (2, 0), (3, 1))
    wanted = (
        "the same number of processes in all, got 2 in process 0 and 3 in process 1"
    )
    assert first == second and wanted in first


def test_a_number_is_taken_once(coordinator):
    found = met(coordinator, (3, 0), (3, 1), (3, 1))
    assert all("got process 1 twice" in text for text in found)


def test_a_stranger_is_not_counted(coordinator):
    with ThreadPoolExecutor(1) as thread:
        all_of_them = thread.submit(met, coordinator, (2, 0))
        odd = (b"[1]", b"7", b"\xff\xfe", b"[Infinity, 2]", b"[" * 4000)
        for said in (b"GET / HTTP/1.1\r\n\r\n", *odd):
            with guest(coordinator, said) as stranger:
                stranger.settimeout(30)
                assert stranger.recv(1) == b""  # it is sent away
        with guest(coordinator, b"[1, 2]\n") as other:
            assert other.makefile().readline() == '["go", ""]\n'
        assert all_of_them.result(timeout=60) == [None]


def test_a_port_that_is_taken_is_refused(coordinator):
    port = int(coordinator.rpartition(":")[2])
    with socket.create_server(("", port)):
        (found,) = met(coordinator, (2, 0))
    assert f"processes: expected a free port at {coordinator}, got " in found


@pytest.mark.parametrize(
    ("numbers", "words"),
    [({3}, "process 3"), ({*range(20)}, "process 0, 1, 2, 3, 4, 5, 6, 7 and 12 more")],
)
def test_a_sentence_names_some_processes(numbers, words):
    assert meeting._named(numbers) == words
