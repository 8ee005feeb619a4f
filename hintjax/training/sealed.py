"""Sealed directories: Orbax trees whose files have checksums.

This is the only file that imports Orbax.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hintjax._checks import Refusal, message
from hintjax.processes import told, told_arrays
from hintjax.training.run_directory import unwritten

RECORD = "hintjax.json"
ORBAX = "_METADATA"  # a file in every directory that Orbax writes
_MARKER = "commit_success.txt"  # of Orbax, in some of its directories
_FORMAT = 2
STAGING = ".hintjax-tmp"
_LARGEST_RECORD = 2**28  # bytes; a larger file is no record and is not read
_BLOCK = 2**20  # bytes of a file in memory while its checksum is computed
_TOGETHER = 4  # threads that compute checksums, at most
_EACH = 2**25  # bytes of files for each of these threads


class DamageError(Refusal):
    """A file on disk is not as it was written."""


def resolve(caller: str, path: str | os.PathLike) -> Path:
    """The absolute path of a local directory; a URL is refused."""
    if "://" in str(path):
        raise Refusal(message(caller, "a local path", str(path)))
    return Path(path).expanduser().absolute()


def make_staging(
    caller: str, staging: Path, target: Path, host: list[np.ndarray]
) -> None:
    """Makes an empty directory to write in, if the disk has room for the arrays.

    Args:
        caller: the function that the user called, for the message of an error.
        staging: the directory. A killed process may have left it; then it is emptied.
        target: the path that will be written, for the message of an error.
        host: the arrays.
    """
    if not any(array.size for array in host):
        raise Refusal(message(caller, "a tree with arrays in it", "none"))
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise unwritten(caller, target, _size(host), error) from error
    if shutil.disk_usage(staging).free < _size(host):
        staging.rmdir()
        full = OSError(errno.ENOSPC, "the disk is full")
        raise unwritten(caller, target, _size(host), full)


def commit(
    caller: str,
    staging: Path,
    target: Path,
    tree: Mapping[str, Any],
    record: dict[str, Any],
) -> None:
    """Writes tree and record in `staging`, and renames them to `target` together."""
    staged = staging / target.name
    try:
        with _orbax() as orbax:
            orbax.save(staged, args=ocp.args.StandardSave(tree))
        _forget_path(staged)
        paths = sorted(path for path in staged.rglob("*") if path.is_file())
        names = [str(path.relative_to(staged)) for path in paths]
        files = dict(zip(names, _sums(paths), strict=True))
        record = {"format": _FORMAT, **record, "files": files}
        sealed = record | {"crc32": zlib.crc32(json.dumps(record).encode())}
        (staged / RECORD).write_text(json.dumps(sealed), encoding="utf-8")
        if is_export(target):
            target.rename(staging / f"{target.name}.replaced")
        staged.rename(target)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise unwritten(caller, target, _size(jax.tree.leaves(tree)), error) from error


def _forget_path(staged: Path) -> None:
    """Takes the path of this machine out of a directory that Orbax has written.

    Orbax writes it into one file, whose presence alone has a meaning. Exports are
    shipped, and a path tells the names of users and projects.
    """
    marker = staged / _MARKER
    if marker.exists():
        marker.write_text("Checkpoint commit was successful.", encoding="utf-8")


def _sums(paths: Sequence[Path]) -> list[list[int]]:
    """Size and checksum of each file, computed by several threads."""

    def one(path: Path) -> list[int]:
        size = crc32 = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc32 = size + len(block), zlib.crc32(block, crc32)
        return [size, crc32]

    total = sum(path.stat().st_size for path in paths)
    most = min(_TOGETHER, 1 + total // _EACH)
    with ThreadPoolExecutor(most, "hintjax-checksums") as threads:
        return list(threads.map(one, paths))


def _size(host: list[np.ndarray]) -> int:
    """The bytes of all arrays."""
    return sum(array.nbytes for array in host)


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a sealed directory, and checks it against its checksum.

    Raises:
        DamageError: the record is missing or damaged.
        ValueError: another format wrote it.
    """
    file = path / RECORD
    try:
        if not file.is_file() or file.is_symlink():
            raise ValueError("no such file")
        if file.stat().st_size > _LARGEST_RECORD:
            raise ValueError(f"it is larger than {_LARGEST_RECORD} bytes")
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["format"]
        if version == _FORMAT:
            found = record.pop("crc32")
            if found != zlib.crc32(json.dumps(record).encode()):
                raise ValueError("its checksum has changed")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    if version != _FORMAT:
        got = f"format {version} in {path}"
        do = "Read it with the version of hintjax that wrote it, or with a newer one."
        raise Refusal(message("checkpoint", f"format {_FORMAT}", got, do))
    return record


def is_export(path: Path) -> bool:
    """Whether `save_tree` wrote this directory."""
    return (path / RECORD).is_file() and "export" in read_record(path)


def read_arrays(
    path: Path, record: dict[str, Any]
) -> tuple[dict[tuple[str, ...], tuple[np.ndarray, str]], dict]:
    """Reads the arrays of a sealed directory, in all processes.

    Returns:
        `{path: (array, key implementation)}` for every recorded array, and the nested
        dicts of arrays that Orbax wrote, with 0 in place of each array.
    """
    entries, here = record["leaves"], []

    def read() -> dict:
        arrays, tree = _arrays(path, record)
        here.extend(arrays)
        return jax.tree.map(lambda _: 0, tree)

    outline = told(read, DamageError)
    kinds = [(shape, jnp.dtype(dtype)) for dtype, shape in (e["data"] for e in entries)]
    arrays = told_arrays(here, kinds)
    return {
        tuple(entry["path"]): (array, entry["key"])
        for entry, array in zip(entries, arrays, strict=True)
    }, outline


def _arrays(path: Path, record: dict[str, Any]) -> tuple[list[np.ndarray], dict]:
    """Reads the recorded arrays, and the tree in which Orbax stores them."""
    _check_files(path, record)
    try:
        with _orbax() as orbax:
            tree = orbax.restore(path)
    except Exception as error:
        raise _damaged(path, error) from error
    arrays = []
    for entry in record["leaves"]:
        dtype, shape = entry["data"]
        array: Any = np.zeros(shape, jnp.dtype(dtype)) if 0 in shape else tree
        for key in () if 0 in shape else entry["path"]:
            array = array.get(key) if isinstance(array, dict) else None
        if (
            not isinstance(array, np.ndarray)
            or [str(array.dtype), [*array.shape]] != entry["data"]
        ):
            raise _damaged(path, "/".join(entry["path"]))
        arrays.append(array)
    return arrays, tree


def _check_files(path: Path, record: dict[str, Any]) -> None:
    """Refuses a directory whose files are not exactly the recorded ones.

    Before Orbax opens the directory, every file has to be in its place, with its size
    and checksum, and there may be no other file that Orbax could read instead.
    """
    files = {path / name: sums for name, sums in record["files"].items()}
    for file in sorted(path.rglob("[!.]*")):
        if file not in files and file.name != RECORD and not file.is_dir():
            raise _damaged(file, "it was not written there")
    for file, (size, _) in files.items():
        if file.resolve() != path.resolve() / file.relative_to(path):
            raise _damaged(file, "it is a link")
        if not file.is_file() or file.stat().st_size != size:
            raise _damaged(file, f"it is not a file of {size} bytes")
    try:
        found = _sums(list(files))
    except OSError as error:
        raise _damaged(path, error) from error
    for file, sums in zip(files, found, strict=True):
        if sums != files[file]:
            raise _damaged(file, "its checksum has changed")


def _damaged(path: Path, reason: object) -> DamageError:
    """The error for a file or directory that is damaged."""
    got = f"damage: {reason}".partition("\n")[0][:200]
    do = "Restore another step."
    return DamageError(message("checkpoint", f"{path} as it was written", got, do))


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Opens Orbax to write or read one directory without logging.

    Errors are raised. Orbax works in this process alone and waits for no other one.
    It logs by absl at every level. Only its own records are dropped, and only until the
    block ends.
    """
    inside = f"{os.sep}orbax{os.sep}"
    absl = logging.getLogger("absl")

    def others(record: logging.LogRecord) -> bool:
        return inside not in record.pathname

    absl.addFilter(others)
    try:
        mine = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=mine,
            active_processes={mine},
            barrier_sync_key_prefix="hintjax",
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
            yield orbax
    finally:
        absl.removeFilter(others)
