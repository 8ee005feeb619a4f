"""A run directory: one process owns it, and its small files are replaced whole."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hintjax._checks import FileRefusal, Refusal, message
from hintjax.processes import first, told

LOCK = "run.lock"

# The directories that this process owns, with the thread that took each of them: a run
# takes its directory again for each of its parts, and two threads are two runs.
_OWNED: set[tuple[Path, int]] = set()


@contextlib.contextmanager
def owned(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a run directory and owns it until the block ends.

    The kernel frees the lock when the process ends, however it ends, so that no lock
    is ever stale. Of several processes the first owns the directory for all.

    Args:
        run_dir: the directory.

    Raises:
        ValueError: at once, if another run owns the directory (the message names its
            process, host and start) or if the directory cannot be written.
    """
    path = Path(run_dir).expanduser().absolute()
    mine = (path, threading.get_ident())

    def take() -> int | None:
        if mine in _OWNED:
            return None
        try:
            path.mkdir(parents=True, exist_ok=True)
            return _lock(path)
        except OSError as error:
            wanted = "a run directory that can be written"
            raise Refusal(message("run", wanted, f"{error}")) from None

    file = told(take)
    if file is None or not first():
        yield
        return
    _OWNED.add(mine)
    try:
        yield
    finally:
        _OWNED.discard(mine)
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
        os.close(file)


def _lock(run_dir: Path) -> int:
    """Locks a directory and returns the open lock file, which names the owner."""
    path = run_dir / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            do = "Wait for it, stop it, or choose another run directory."
            got = f"{run_dir} in use by {_owner(path)}"
            raise Refusal(
                message("run", "a run directory of its own", got, do)
            ) from None
        except OSError as error:  # some network file systems have no locks
            text = f"{run_dir} is not protected from a second run: {error}"
            warnings.warn(text, stacklevel=4)
        # An owner that ended in between has removed the file that is open here.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                break
        os.close(file)
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.truncate(file, 0)
    os.write(file, json.dumps(owner).encode())
    return file


def _owner(lock: Path) -> str:
    """Describes the owner of a lock."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # it has not written its name yet
        return "another process"


def inside(root: Path, name: str) -> Path:
    """Returns `root / name`, and refuses a name that leads out of `root`.

    Links are followed.

    >>> inside(Path("runs"), "digits/seed0")
    PosixPath('runs/digits/seed0')
    >>> inside(Path("runs"), "../elsewhere")
    Traceback (most recent call last):
    ...
    hintjax._checks.Refusal: run: expected a name within runs, got '../elsewhere'.
    """
    path, top = root / name, root.resolve()
    if top not in path.resolve().parents:
        raise Refusal(message("run", f"a name within {root}", repr(name)))
    return path


def write_text(path: Path, text: str) -> None:
    """Replaces the text of a file, as a whole or not at all.

    Of several processes the first does it.
    """
    told(partial(replace_text, path, text))


def read_json(path: Path) -> Any:
    """Reads a JSON file, in all processes; returns None if there is no such file."""
    return told(lambda: json.loads(path.read_text()) if path.exists() else None)


def replace_text(path: Path, text: str) -> None:
    """Replaces the text of a file, as `write_text`, but in this process alone.

    It is for code that only the first process runs.
    """
    staging = path.with_name(f".{path.name}.tmp")
    data = text.encode()
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise unwritten("write", path, len(data), error) from error


def unwritten(caller: str, target: Path, needed: int, error: Exception) -> OSError:
    """Makes the error that says that a file or directory was not written.

    Args:
        caller: the function that the user called.
        target: the path that was to be written.
        needed: the number of bytes.
        error: the error that writing has raised.

    Returns:
        An error to raise instead, with the room that is needed and the room that is
        free.
    """
    reason = str(error).partition("\n")[0][:300]
    code = getattr(error, "errno", None) or errno.EIO
    if code == errno.ENOSPC or "No space left" in str(error):  # as tensorstore words it
        reason, code = "the disk is full", errno.ENOSPC
    there = next(path for path in target.parents if os.path.exists(path))
    free = shutil.disk_usage(there).free
    text = (
        f"{caller}: nothing was written, {reason}; {needed} bytes are needed and "
        f"{free} are free. Earlier content is unchanged"
    )
    return FileRefusal(code, text, str(target))
