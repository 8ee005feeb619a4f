"""Checkpoints and exports on disk; the only file that imports Orbax.

A checkpoint is one directory, ``<directory>/<step>``: an Orbax tree of plain nested
dicts of numpy arrays and, in it, ``hintjax.json`` with the caller's `extra` and the
path, dtype and shape of every array and the size and checksum of every file. Both are
written under a temporary name and renamed together, so that a step is there whole or
not at all. What is damaged later is seen before Orbax reads it, and an older step is
read instead.

Of several processes the first reads and writes; what it reads it sends to the others,
and what is stored in shares is gathered for it, so that nothing but the first process
needs the directory. All of them have to make the same calls.

Orbax is asked for two things only, to write and to read one directory, and writes on
one thread of ours. Its managers stay out: one skips a save while another is in flight,
one deletes the newest step when it keeps the best one, both cast on restore, and both
lose what is in flight when the interpreter ends.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import operator
import os
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from hintjax._checks import message, positive_int
from hintjax.processes import first, gather, told, told_arrays
from hintjax.rundir import unwritten
from hintjax.sharding import spread

_RECORD = "hintjax.json"
_ORBAX = "_METADATA"  # in all that Orbax writes
_FORMAT = 2
_STAGING = ".hintjax-tmp"
_DAMAGED = ".damaged"
_SHOWN = 10  # differences that an error lists
_LARGEST_RECORD = 2**28  # bytes that are read of what may be anything
_BLOCK = 2**20  # bytes of a file that are summed at once
_TOGETHER, _EACH = 4, 2**25  # threads that sum, at most, and bytes that are worth one

# Saves whose outcome nobody has been told yet.
_UNTOLD: set[Future] = set()


class DamageError(ValueError):
    """What is on disk is not what was written there."""


class _Leaf(NamedTuple):
    """What is known of an array before its values."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    key: str  # the implementation, if it holds typed PRNG keys


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run; made by `open_checkpoints`.

    Whatever reads waits for a save in flight first.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "hintjax-checkpoint")
        self._saving: Future | None = None
        self._damaged: set[int] = set()  # steps that a restore passed over

    def save(
        self,
        step: SupportsIndex,
        tree: PyTree,
        extra: Mapping[str, Any] | None = None,
        *,
        best: bool = False,
    ) -> None:
        """Copies `tree` to the host, returns, and writes it and `extra` behind.

        The arrays may be donated straight afterwards. A save in flight is waited for;
        if it failed, that is raised here, and this one has not started.

        Args:
          step: above every step that is there.
          tree: arrays, typed PRNG keys among them, in any pytree.
          extra: what JSON can hold, stored and read together with the tree.
          best: marks the step; the newest one so marked outlives the latest `keep`.
        """
        step, newest = operator.index(step), max(self.steps(), default=-1)
        if step <= newest:
            do = f"Steps only grow, and nothing in {self.directory} is overwritten."
            raise ValueError(message("save", f"a step above {newest}", f"{step}", do))
        leaves, arrays = _flatten("save", tree)
        record = {"best": best, "extra": _json(extra or {})}
        # A view of a CPU device's memory would keep that memory from being donated.
        host = [array.copy() for array in _fetch(arrays)]
        target, staging = self.directory / str(step), self.directory / _STAGING
        told(partial(_stage, "save", staging, target, host))
        if first():
            self._saving = self._thread.submit(
                self._write, staging, target, leaves, host, record
            )
            _UNTOLD.add(self._saving)

    def _write(
        self,
        staging: Path,
        target: Path,
        leaves: list[_Leaf],
        host: list[np.ndarray],
        record: dict[str, Any],
    ) -> None:
        try:
            self._set_aside()
            record["leaves"] = _entries(leaves, host)
            _commit("save", staging, target, _nest(leaves, host), record)
            with contextlib.suppress(OSError):  # it is saved; the next save tries again
                self._retire(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _set_aside(self) -> None:
        """Renames what a restore found damaged: the run goes over these steps again."""
        for step in self._damaged:
            path = self.directory / str(step)
            aside = path.with_name(f"{step}{_DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)  # of a still earlier fall
            with contextlib.suppress(OSError):
                path.rename(aside)
        self._damaged.clear()

    def _retire(self, trash: Path) -> None:
        """Moves away what is not kept: half deleted, it must not look like a step.

        The newest step has just been written whole; those that are damaged are aside.
        """
        steps = self._steps()
        for step in set(steps) - {*steps[-self.keep :], self._best(steps)}:
            (self.directory / str(step)).rename(trash / f"{step}.retired")

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        # Either file may be what is missing of a step.
        found = [self.directory.glob(f"*/{name}") for name in (_RECORD, _ORBAX)]
        names = {file.parent.name for files in found for file in files}
        steps = {int(name) for name in names if name.isdecimal()}
        return sorted(steps - self._damaged)

    def _best(self, steps: list[int]) -> int | None:
        for step in reversed(steps):
            with contextlib.suppress(DamageError):
                if _record(self.directory / str(step))["best"]:
                    return step
        return None

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        self.wait()
        return told(self._steps)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The newest step that was saved with ``best=True``, or None."""
        steps = self.steps()
        return told(lambda: self._best(steps))

    def _find(self, caller: str, step: SupportsIndex | None) -> list[Path]:
        """The directory of a step, or those of all, the newest first."""
        steps = self.steps()
        if not steps:
            raise ValueError(
                message(caller, f"a checkpoint in {self.directory}", "none")
            )
        if step is not None and operator.index(step) not in steps:
            wanted = f"one of the steps {steps} in {self.directory}"
            raise ValueError(message(caller, wanted, str(step)))
        chosen = reversed(steps) if step is None else [operator.index(step)]
        return [self.directory / str(step) for step in chosen]

    def peek(self, step: SupportsIndex | None = None) -> dict[str, Any]:
        """The `extra` of a step, the newest if None, without reading its tree.

        It says which stage wrote the step.
        """
        path = self._find("peek", step)[0]
        return told(lambda: _record(path), DamageError)["extra"]

    def restore(
        self,
        like: PyTree | Callable[[dict[str, Any]], PyTree],
        step: SupportsIndex | None = None,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step, the newest if None, into the structure of `like`.

        If the newest is damaged, the newest that is not is read instead, with a
        warning; the next save sets the damaged ones aside as ``<step>.damaged``.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`, or a function that makes one
            for a step's `extra`. Values are not read, so that donated arrays will do;
            every array goes where its counterpart lies.
          step: which step.

        Returns:
          The tree, equal bit for bit to the one that was saved, and its `extra`.

        Raises:
          DamageError: the step is damaged, or every step is.
          ValueError: paths, shapes or dtypes differ (nothing is cast, and nothing is
            restored in part), or there is no such step.
        """
        paths, damaged = self._find("restore", step), {}
        for path in paths:
            try:
                tree, extra = _restore(path, like)
            except DamageError as error:
                if step is not None:
                    raise
                damaged[path] = error
                continue
            if damaged:
                self._damaged |= {int(path.name) for path in damaged}
                errors = "\n".join(map(str, damaged.values()))
                went = f"went back to step {path.name}, the newest that is whole"
                warnings.warn(f"{errors}\nrestore: {went}.", stacklevel=2)
            return tree, extra
        errors = "\n".join(map(str, damaged.values()))
        wanted = f"a checkpoint in {self.directory} that is whole"
        raise DamageError(message("restore", wanted, f"none:\n{errors}"))

    def poll(self) -> None:
        """Raises OSError if a save has failed; waits for nothing, and so leaves it to
        the next call where there are several processes, which have to raise together.
        """
        if jax.process_count() == 1 and self._saving and self._saving.done():
            self._wait()

    def wait(self) -> None:
        """Returns when nothing is in flight; raises OSError if the save failed."""
        told(self._wait)

    def _wait(self) -> None:
        if self._saving is None:
            return
        error = self._saving.exception()
        _UNTOLD.discard(self._saving)
        self._saving = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits, as the end of a ``with`` block does, for what this process saves."""
        self._wait()

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self._wait()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the block stays the error


def open_checkpoints(directory: str | os.PathLike, *, keep: int = 2) -> Checkpoints:
    """The checkpoints in `directory`; the first save makes it if it is not there.

    Args:
      directory: a local directory; relative paths and ``~`` are resolved now.
      keep: how many of the latest steps stay, besides the best one.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     with open_checkpoints(directory) as checkpoints:
    ...         checkpoints.save(10, {"w": jnp.arange(2)}, {"stage": "hint"})
    ...         print(checkpoints.latest(), checkpoints.peek())
    ...         tree, extra = checkpoints.restore({"w": jnp.zeros(2, int)})
    10 {'stage': 'hint'}
    >>> tree
    {'w': Array([0, 1], dtype=int32)}
    """
    positive_int("open_checkpoints", keep=keep)
    path = _resolve("open_checkpoints", directory)
    if path.exists() and not path.is_dir():
        raise ValueError(message("open_checkpoints", "a directory", f"the file {path}"))
    return Checkpoints(path, keep)


def fingerprint(tree: PyTree) -> str:
    """SHA-256 over the sorted paths, dtypes, shapes and bytes of a tree.

    Containers and devices do not count: a dict, a NamedTuple of the same fields and
    sharded copies of either have one fingerprint.

    >>> fingerprint({"w": np.zeros(2, np.float32)})[:12]
    'bdce4ce55dfb'
    """
    leaves, arrays = _flatten("fingerprint", tree)
    digest = hashlib.sha256()
    for leaf, array in sorted(zip(leaves, _fetch(arrays), strict=True)):
        digest.update(json.dumps([leaf.path, leaf.dtype, leaf.shape]).encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def save_tree(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as one Orbax directory, there when it returns.

    Plain Orbax reads it as well: ``StandardCheckpointer().restore(path)``.

    Args:
      path: a new or empty directory, or an earlier export, which is replaced.
      tree: what ``module.apply`` takes: ``{"params": ..., "batch_stats": ...}``.
    """
    target = _resolve("save_tree", path)

    def look():
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty and not _is_export(target):
            wanted = "a new or empty directory or an earlier export"
            do = "Choose another path: what others wrote is not overwritten."
            raise ValueError(message("save_tree", wanted, str(target), do))

    told(look)
    tree = _plain(tree, ())
    leaves, arrays = _flatten("save_tree", tree)
    host = _fetch(arrays)
    for leaf, array in zip(leaves, host, strict=True):
        if leaf.key or not array.size:
            wanted = f"{'/'.join(leaf.path)} to be a plain array, and not empty"
            raise ValueError(
                message("save_tree", wanted, _kind(leaf.dtype, leaf.shape))
            )
    staging = target.with_name(f".{target.name}{_STAGING}")
    tree = jax.tree.unflatten(jax.tree.structure(tree), host)

    def write():
        _stage("save_tree", staging, target, host)
        try:
            record = {"export": True, "leaves": _entries(leaves, host)}
            _commit("save_tree", staging, target, tree, record)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    told(write)


def load_tree(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_tree` wrote: nested dicts of arrays, with nothing else to know.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     save_tree(f"{directory}/student", {"params": {"bias": jnp.ones(2)}})
    ...     load_tree(f"{directory}/student")
    {'params': {'bias': Array([1., 1.], dtype=float32)}}
    """
    source = _resolve("load_tree", path)

    def look():
        if not _is_export(source):
            wanted = "a directory that save_tree wrote"
            raise ValueError(message("load_tree", wanted, str(source)))
        return _record(source)

    stored, outline = _read(source, told(look, DamageError))

    def place(path: Any, _: int) -> jax.Array:
        names = _names(path)
        array, key = stored[names]
        like = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return _place(names, array, key, like)

    return jax.tree_util.tree_map_with_path(place, outline)


# Trees and arrays.


def _flatten(caller: str, tree: PyTree) -> tuple[list[_Leaf], list[Any]]:
    """The arrays of a tree by path; None and empty containers are structure only."""
    leaves, arrays, taken = [], [], {}
    for keys, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = _names(keys)
        kinds = (np.number, np.bool_, jax.dtypes.prng_key)
        dtype = getattr(array, "dtype", None)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            wanted = f"{'/'.join(path)} to be an array of numbers"
            do = "Make it one (jnp.asarray), or keep it in extra."
            raise TypeError(message(caller, wanted, f"{type(array).__name__}", do))
        # Orbax joins keys with dots and writes {"a.b": x} over {"a": {"b": y}}.
        other = taken.setdefault("/".join(path).replace(".", "/"), path)
        if other is not path:
            wanted = "paths that differ when their keys are joined with dots"
            raise ValueError(message(caller, wanted, f"{path} and {other}"))
        key = isinstance(array, jax.Array) and _is_key(array)
        key = str(jax.random.key_impl(array)) if key else ""
        leaves.append(_Leaf(path, str(dtype), tuple(array.shape), key))
        arrays.append(array)
    return leaves, arrays


def _names(keys: Sequence[Any]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _fetch(arrays: Sequence[Any]) -> list[np.ndarray]:
    """On the host, keys as their data. All transfers start before the first ends."""
    data = [jax.random.key_data(x) if _is_key(x) else x for x in arrays]
    data = [gather(x) if _is_apart(x) else x for x in data]
    return [np.asarray(array) for array in jax.device_get(data)]


def _is_apart(array: Any) -> bool:
    """Whether no process has all of it."""
    return isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    )


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _kind(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {tuple(shape)}"


def _entries(leaves: list[_Leaf], host: list[np.ndarray]) -> list[dict[str, Any]]:
    """The leaves as the record has them: `data` is what lies on disk."""
    return [
        leaf._asdict() | {"data": [str(array.dtype), array.shape]}
        for leaf, array in zip(leaves, host, strict=True)
    ]


def _nest(leaves: list[_Leaf], host: list[np.ndarray]) -> dict[str, Any]:
    """Nested dicts by path, less arrays of size 0, which Orbax cannot write."""
    tree: dict[str, Any] = {}
    for leaf, array in zip(leaves, host, strict=True):
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        if array.size:
            node[leaf.path[-1]] = array
    return tree


def _plain(node: Any, path: tuple[str, ...]) -> Any:
    """The same dicts as plain ones: nothing else comes back as what it was."""
    if isinstance(node, Mapping) and all(isinstance(key, str) for key in node):
        return {key: _plain(child, (*path, key)) for key, child in node.items()}
    if path and hasattr(node, "dtype"):
        return node
    wanted = f"{'/'.join(path) or 'tree'} to be a dict with strings as keys"
    raise TypeError(message("save_tree", wanted, type(node).__name__))


def _place(path: tuple[str, ...], value: np.ndarray, key: str, like: Any) -> Any:
    """The value as an array of the kind of `like`, where `like` lies."""
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    placed: Any = value
    if key:
        placed = jax.random.wrap_key_data(value, impl=key)
    elif like.weak_type:
        # A strong type here would promote otherwise than the run that saved it.
        placed = jnp.full(value.shape, value.dtype.type(0).item()).at[...].set(value)
    # An array that was free to join any mesh stays free.
    if like.sharding is not None and getattr(like, "committed", True):
        placed = spread(placed, like.sharding)
    else:
        placed = jnp.asarray(placed)
    if placed.dtype != like.dtype:
        wanted = f"{'/'.join(path)} as {like.dtype}"
        do = "Set jax_enable_x64, as the run that saved it had."
        raise ValueError(message("checkpoint", wanted, str(placed.dtype), do))
    return placed


# Directories.


def _resolve(caller: str, path: str | os.PathLike) -> Path:
    if "://" in str(path):
        raise ValueError(message(caller, "a local path", str(path)))
    return Path(path).expanduser().absolute()


def _json(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as JSON will give it back."""
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        wanted = "extra to hold what JSON can"
        raise TypeError(message("save", wanted, str(error))) from error


def _stage(caller: str, staging: Path, target: Path, host: list[np.ndarray]) -> None:
    """Makes `staging` anew, if there is room; a killed process may have left it."""
    if not any(array.size for array in host):
        raise ValueError(message(caller, "a tree with arrays in it", "none"))
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise unwritten(caller, target, _size(host), error) from error
    if shutil.disk_usage(staging).free < _size(host):
        staging.rmdir()
        full = OSError(errno.ENOSPC, "the disk is full")
        raise unwritten(caller, target, _size(host), full)


def _commit(
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
        (staged / _RECORD).write_text(json.dumps(sealed), encoding="utf-8")
        if _is_export(target):
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


def _record(path: Path) -> dict[str, Any]:
    file = path / _RECORD
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
        raise ValueError(message("checkpoint", f"format {_FORMAT}", got, do))
    return record


def _is_export(path: Path) -> bool:
    return (path / _RECORD).is_file() and "export" in _record(path)


def _restore(path: Path, like: Any) -> tuple[PyTree, dict[str, Any]]:
    """One step in the structure of `like`, with its `extra`."""
    record = told(lambda: _record(path), DamageError)
    like = like(record["extra"]) if callable(like) else like
    leaves, targets = _flatten("restore", like)
    _refuse_other(path, record["leaves"], leaves)
    stored, _ = _read(path, record)
    values = [
        _place(leaf.path, *stored[leaf.path], target)
        for leaf, target in zip(leaves, targets, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values), record["extra"]


def _read(path: Path, record: dict[str, Any]) -> tuple[dict, dict]:
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
        if file not in files and file.name != _RECORD and not file.is_dir():
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


def _refuse_other(path: Path, stored: list[dict], wanted: list[_Leaf]) -> None:
    """Raise, listing the differences, unless the two have one structure."""
    there = {tuple(x["path"]): _kind(x["dtype"], x["shape"]) for x in stored}
    here = {leaf.path: _kind(leaf.dtype, leaf.shape) for leaf in wanted}
    differences = [
        f"{'/'.join(leaf)}: {there.get(leaf, 'nothing')} stored, "
        f"{here.get(leaf, 'nothing')} wanted"
        for leaf in sorted(there.keys() | here.keys())
        if there.get(leaf) != here.get(leaf)
    ]
    if not differences:
        return
    shown = differences[:_SHOWN]
    if len(differences) > _SHOWN:
        shown.append(f"and {len(differences) - _SHOWN} more")
    do = "Build `like` from the models, the method and the optimizer that were saved."
    got = "\n  ".join([f"{len(differences)} differences:", *shown]) + "\n"
    raise ValueError(message("restore", f"the tree in {path}", got, do))


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


def _finish() -> None:
    """Lets a save in flight end, and tells of failures that nobody asked for."""
    for saving in tuple(_UNTOLD):
        error = saving.exception()
        if error is not None:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)


# Orbax needs threads, and none start once the interpreter shuts down, which is before
# atexit: what is in flight has to end earlier.
getattr(threading, "_register_atexit", atexit.register)(_finish)
