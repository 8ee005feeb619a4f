"""Sealed directories: Orbax trees whose files and arrays have checksums."""

import contextlib
import errno
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
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
ORBAX = "_METADATA"  # in all that Orbax writes
_FORMAT = 2
STAGING = ".hintjax-tmp"
_LARGEST_RECORD = 2**28  # bytes that are read of what may be anything
_BLOCK = 2**20  # bytes of a file that are summed at once
_TOGETHER, _EACH = 4, 2**25  # threads that sum, at most, and bytes that are worth one


class DamageError(Refusal):
    """What is on disk is not what was written there."""


# Directories.


def resolve(caller: str, path: str | os.PathLike) -> Path:
    if "://" in str(path):
        raise Refusal(message(caller, "a local path", str(path)))
    return Path(path).expanduser().absolute()


def make_staging(
    caller: str, staging: Path, target: Path, host: list[np.ndarray]
) -> None:
    """Makes `staging` anew, if there is room; a killed process may have left it."""
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
    caller: str, staging: Path, target: Path, tree: dict, record: dict[str, Any]
) -> None:
    """Writes tree and record under `staging`, and renames them into place together."""
    staged = staging / target.name
    try:
        with _orbax() as orbax:
            orbax.save(staged, args=ocp.args.StandardSave(tree))
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


def _sums(paths: Sequence[Path]) -> list[list[int]]:
    """Size and checksum of files, several at a time."""

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
    return sum(array.nbytes for array in host)


def read_record(path: Path) -> dict[str, Any]:
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
                raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    if version != _FORMAT:
        got = f"format {version} in {path}"
        do = "Read it with the version of hintjax that wrote it, or a newer one."
        raise Refusal(message("checkpoint", f"format {_FORMAT}", got, do))
    return record


def is_export(path: Path) -> bool:
    return (path / RECORD).is_file() and "export" in read_record(path)


def read_arrays(path: Path, record: dict[str, Any]) -> tuple[dict, dict]:
    """{path: (array, key implementation)}, all as recorded, and nested dicts with a 0
    for each of what Orbax wrote; in all processes."""
    entries, here = record["leaves"], []

    def read():
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
    """The arrays that lie there, as recorded, and Orbax's tree of them.

    Before Orbax opens a file, it has to be a file in its place, of its size, and whole;
    and there is nothing else that it could read instead.
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
            raise _damaged(file, "its checksum is another")
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


def _damaged(path: Path, what: object) -> DamageError:
    got = f"damage: {what}".partition("\n")[0][:200]
    do = "Restore another step."
    return DamageError(message("checkpoint", f"{path} as it was written", got, do))


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax for one directory, in silence: what goes wrong is raised.

    It is this process' own, and waits for no other.

    It logs by absl at every level; only its own records are dropped, and only while
    it works for us.
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
