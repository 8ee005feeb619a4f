"""One owner of a run directory, names that stay within, files replaced whole."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hintjax.training.run_directory import LOCK, inside, owned, write_text

OWNER = """
import sys, time
from hintjax.training.run_directory import owned
with owned(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_at_once_and_a_kill_frees_it(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "run")],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout.readline() == "mine\n"
        start = time.perf_counter()
        with (
            pytest.raises(ValueError, match="run: expected") as refused,
            owned(tmp_path / "run"),
        ):
            pass
        assert time.perf_counter() - start < 1
        text = str(refused.value)
        assert f"in use by process {owner.pid} on {socket.gethostname()} since" in text
        assert "choose another" in text
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert (tmp_path / "run" / LOCK).exists()  # but nobody holds it
    with owned(tmp_path / "run"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "run" / LOCK).read_text()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.quick
def test_parts_of_a_run_share_its_directory_and_other_threads_do_not(tmp_path):
    refused = []

    def other():
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), owned(tmp_path):
            pass
        refused.append(True)

    with owned(tmp_path), owned(tmp_path), owned(tmp_path / "teacher"):
        with owned(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused
    with owned(tmp_path):
        pass


def test_an_owner_that_ends_between_open_and_lock_is_no_trap(tmp_path, monkeypatch):
    """The file that was opened is gone: a lock on it protects nothing."""
    flock, removed = fcntl.flock, []

    def first_remove(file, how):
        flock(file, how)
        if not removed:
            removed.append(os.unlink(tmp_path / LOCK))

    monkeypatch.setattr(fcntl, "flock", first_remove)
    with owned(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="not protected from a second run"),
        owned(tmp_path),
    ):
        pass


@pytest.mark.quick
def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="a run directory that can be written, got"),
        owned(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.quick
def test_names_stay_within_their_root(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    for name in ("a", "a/b", "größe ñ", "..a"):
        assert inside(tmp_path / "runs", name) == tmp_path / "runs" / name
    for name in ("..", "../a", "a/../../b", "/etc", "", ".", "link", "link/a"):
        with pytest.raises(ValueError, match="a name within"):
            inside(tmp_path / "runs", name)


@pytest.mark.quick
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_text(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"is full; 9 bytes are needed and \d+ are free"):
        write_text(path, "something")
    assert path.read_text(encoding="utf-8") == "größe"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
