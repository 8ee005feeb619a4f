"""Rows of a cache on disk: shards with checksums, which a killed process can resume.

    cache.json             the identity of the cache
    shards.jsonl           one line per finished shard: name, bytes, checksum
    shards-1.jsonl         the same, for shards that process 1 has written
    rows-00000.npy         rows of one shard, one record per row

A shard is written beside its name, moved there, and then listed. Only listed shards
count, so a process that is killed loses at most one shard.

Several processes of one run share the missing shards: each computes and writes its own
part. So the directory must be on a file system that all of them see, at the same path.
A run reads any example on any process, so every process reads all shards.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from hintjax._checks import Refusal, message
from hintjax.processes import each, told
from hintjax.training.run_directory import owned, read_json, unwritten, write_text
from hintjax.training.sealed import DamageError

IDENTITY = "cache.json"
_SHARD = 2**26  # bytes of a shard, at most (but at least one row)
_PARTS = 16  # shards of a cache, at least, so that several processes share the work
_BLOCK = 2**20  # bytes in memory while a checksum is computed

Compute = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Rows(NamedTuple):
    """All rows of a cache, in memory or mapped from disk.

    Attributes:
        shards: records of each shard.
        size: the number of rows in each shard but the last.
        examples: the number of examples; row `view * examples + index`.
    """

    shards: Sequence[np.ndarray]
    size: int
    examples: int

    def read(
        self, index: Integer[np.ndarray, " n"], view: Integer[np.ndarray, " n"] | int
    ) -> dict[str, np.ndarray]:
        """The rows of some examples, in one view each.

        Args:
            index: positions of the examples.
            view: the number of the view of each example.

        Raises:
            ValueError: if there is no such row.
        """
        rows = np.asarray(view) * self.examples + np.asarray(index)
        total = sum(map(len, self.shards))
        outside = (np.asarray(index) >= self.examples) | (rows < 0) | (rows >= total)
        if outside.any():
            views = total // self.examples
            wanted = f"index in 0..{self.examples - 1} and view in 0..{views - 1}"
            got = f"{np.asarray(index)[outside][:3]}, view {view}"
            raise Refusal(message("cache", wanted, got))
        found = np.empty(rows.shape, self.shards[0].dtype)
        which = rows // self.size
        for shard in np.unique(which):
            mine = which == shard
            found[mine] = self.shards[shard][rows[mine] - shard * self.size]
        return {name: found[name] for name in found.dtype.names or ()}

    def everything(self) -> dict[str, np.ndarray]:
        """All rows, in memory."""
        names = self.shards[0].dtype.names or ()
        return {name: np.concatenate([s[name] for s in self.shards]) for name in names}

    @property
    def nbytes(self) -> int:
        """The number of bytes of all rows."""
        return sum(shard.nbytes for shard in self.shards)


def record_type(rows: Mapping[str, jax.ShapeDtypeStruct]) -> np.dtype:
    """The numpy type of one row.

    Args:
        rows: shape and dtype of each array of a row, by name.
    """
    return np.dtype([(name, row.dtype, row.shape) for name, row in rows.items()])


def by_batches(
    encode: Callable[[Any], Mapping[str, Any]],
    batch_of: Callable[[np.ndarray, int], Any],
    batch_size: int,
    examples: int,
) -> Compute:
    """Computes rows in batches of one size.

    Args:
        encode: `batch -> arrays of its rows`, by name.
        batch_of: `(index, view) -> batch` of some examples in one view.
        batch_size: the number of examples in a batch. With the batch size of training,
            float32 rows have the bits that a live teacher gives in most networks.
        examples: the number of examples.

    Returns:
        `numbers of rows -> arrays of these rows`, by name.
    """

    def compute(numbers: np.ndarray) -> dict[str, np.ndarray]:
        done = []
        for view in np.unique(numbers // examples):
            index = numbers[numbers // examples == view] % examples
            for start in range(0, len(index), batch_size):
                some = index[start : start + batch_size]
                batch = batch_of(np.resize(some, batch_size), int(view))
                found = jax.device_get(encode(batch))
                done.append({name: x[: len(some)] for name, x in found.items()})
        return {name: np.concatenate([d[name] for d in done]) for name in done[0]}

    return compute


def in_memory(
    rows: Mapping[str, jax.ShapeDtypeStruct],
    total: int,
    examples: int,
    compute: Compute,
) -> Rows:
    """Computes all rows into memory.

    Args:
        rows: shape and dtype of each array of a row, by name.
        total: the number of rows.
        examples: the number of examples.
        compute: `numbers of rows -> arrays of these rows`, by name.
    """
    filled = _filled(record_type(rows), np.arange(total), compute)
    return Rows([filled], total, examples)


def write(
    directory: str | os.PathLike[str],
    identity: Mapping[str, Any],
    rows: Mapping[str, jax.ShapeDtypeStruct],
    total: int,
    compute: Compute,
    *,
    show: Callable[[int], None] = lambda done: None,
) -> None:
    """Computes the rows that a directory lacks, and writes them there.

    A directory whose writing was interrupted is completed. Two runs never write one
    directory. The processes of one run write it together. Shards that are there are not
    checked; `read` checks them.

    Args:
        directory: a new directory, or one with the same identity.
        identity: plain values that say what the rows are: the teacher, the data, the
            views, the features.
        rows: shape and dtype of each array of a row, by name.
        total: the number of rows.
        compute: `numbers of rows -> arrays of these rows`, by name.
        show: is called after each shard, with the number of rows that this process has
            finished and the rows that were there.

    Raises:
        ValueError: if the directory holds a cache with another identity, if another run
            writes there, or if a process does not see the directory.
        OSError: if the disk is full.
    """
    path = _same(directory)
    kind = record_type(rows)
    with owned(path):
        if read_json(path / IDENTITY) is None:
            write_text(path / IDENTITY, _text(identity))
        check_identity(path, identity)
        each(lambda: check_shared(path))
        lacking = _lacking(path, total, kind)
        done = total - sum(len(numbers) for _, numbers in lacking)

        def complete() -> None:
            finished = done
            for name, numbers in lacking[jax.process_index() :: jax.process_count()]:
                _add(path / name, _filled(kind, numbers, compute))
                finished += len(numbers)
                show(finished)

        each(complete)


def missing(
    directory: str | os.PathLike[str],
    rows: Mapping[str, jax.ShapeDtypeStruct],
    total: int,
) -> int:
    """The number of rows that a directory lacks.

    Args:
        directory: a directory of `write`, or one that does not exist yet.
        rows: shape and dtype of each array of a row, by name.
        total: the number of rows of the whole cache.
    """
    lacking = _lacking(_same(directory), total, record_type(rows))
    return sum(len(numbers) for _, numbers in lacking)


def read(
    directory: str | os.PathLike[str],
    identity: Mapping[str, Any] | None = None,
    *,
    mapped: bool = False,
) -> Rows:
    """Reads a complete cache, and checks every byte once.

    Of several processes each checks its part, and reads all rows.

    Args:
        directory: a directory that `write` has completed.
        identity: the expected identity. None accepts any.
        mapped: whether the rows stay on disk and are read when they are needed.

    Returns:
        The rows.

    Raises:
        ValueError: if the cache has another identity, is damaged or incomplete.
    """
    path = _same(directory)
    found = check_identity(path, identity)
    listed = told(lambda: _listed(path))
    names = sorted(listed)

    def check() -> None:
        for name in names[jax.process_index() :: jax.process_count()]:
            _check(path / name, listed[name])

    def load() -> list[np.ndarray]:
        mode = "r" if mapped else None
        return [
            np.load(path / name, mmap_mode=mode, allow_pickle=False) for name in names
        ]

    each(check)
    shards = each(load)
    held = sum(map(len, shards))
    if held != found["total"]:
        wanted = f"{found['total']} rows in {path}"
        do = "Start the run again; it computes the missing rows."
        raise Refusal(message("cache", wanted, f"{held}", do))
    return Rows(shards, len(shards[0]), found["examples"])


def check_identity(path: Path, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads the identity of a cache, and names the first field that differs.

    Args:
        path: directory of the cache.
        identity: the expected identity; None accepts any.

    Raises:
        ValueError: if there is no cache, or if a field differs.
    """
    found = read_json(path / IDENTITY)
    if found is None:
        raise Refusal(message("cache", f"a cache in {path}", "none"))
    for name in sorted({*found, *(identity or found)}):
        wanted = json.loads(_text(identity or found)).get(name)
        if found.get(name) != wanted:
            do = "Use another directory for the cache, or delete this one."
            expected = f"a cache in {path} with {name} {_short(wanted)}"
            raise Refusal(message("cache", expected, _short(found.get(name)), do))
    return found


def check_shared(path: Path) -> None:
    """Raises if this process does not see the directory of a cache.

    Args:
        path: the directory, in which process 0 has written the identity.

    Raises:
        ValueError: if the identity is not there.
    """
    if not (path / IDENTITY).exists():
        got = f"no {path} in process {jax.process_index()}"
        do = "Use a directory on a file system of all hosts, or train without a cache."
        wanted = "a directory that all processes share"
        raise Refusal(message("cache", wanted, got, do))


def _same(directory: str | os.PathLike[str]) -> Path:
    """The path of a directory in process 0, which all processes use."""
    return Path(told(lambda: str(Path(directory).expanduser().absolute())))


def _lacking(path: Path, total: int, kind: np.dtype) -> list[tuple[str, np.ndarray]]:
    """The shards that a directory lacks: name, and numbers of the rows."""
    done = told(lambda: _listed(path))
    return [part for part in _parts(total, kind) if part[0] not in done]


def _parts(total: int, kind: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each shard, and the numbers of its rows."""
    size = max(1, min(_SHARD // max(1, kind.itemsize), -(-total // _PARTS)))
    for number, start in enumerate(range(0, total, size)):
        yield f"rows-{number:05}.npy", np.arange(start, min(start + size, total))


def _filled(kind: np.dtype, numbers: np.ndarray, compute: Compute) -> np.ndarray:
    """The records of some rows."""
    filled = np.empty(len(numbers), kind)
    for name, stored in compute(numbers).items():
        filled[name] = np.asarray(stored)
    return filled


def _add(path: Path, filled: np.ndarray) -> None:
    """Writes a shard, and then lists it."""
    staging = path.with_name(f".{path.name}.tmp")
    try:
        with staging.open("wb") as file:
            np.save(file, filled, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        seal = [path.name, *_sum(staging)]
        staging.replace(path)
        process = jax.process_index()
        list_of = f"shards-{process}.jsonl" if process else "shards.jsonl"
        with (path.parent / list_of).open("a", encoding="utf-8") as file:
            file.write(json.dumps(seal) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise unwritten("cache", path, filled.nbytes, error) from error


def _listed(path: Path) -> dict[str, list[int]]:
    """The finished shards: bytes and checksum by name."""
    found = {}
    for listed in sorted(path.glob("shards*.jsonl")):
        for line in listed.read_text(encoding="utf-8").splitlines():
            # A killed process may have left half a line.
            with contextlib.suppress(ValueError):
                name, *seal = json.loads(line)
                found[name] = seal
    return found


def _check(path: Path, seal: list[int]) -> None:
    """Raises unless a shard has the bytes that were written."""
    if not path.exists() or _sum(path) != seal:
        do = "Delete the directory, or restore the file from a copy."
        raise DamageError(message("cache", f"{path} as it was written", "others", do))


def _sum(path: Path) -> list[int]:
    """The size and the checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=1, sort_keys=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
