"""Checkpoints: the steps of one run on disk, each one whole or not there.

A checkpoint is one directory, ``<directory>/<step>``. It holds an Orbax tree of plain
nested dicts of numpy arrays, and ``hintjax.json`` with the caller's `extra`, the path,
dtype and shape of every array, and the size and checksum of every file. Both are
written under a temporary name and renamed together, so that a step is there whole or
not at all. Damage that happens later is seen before Orbax reads the directory, and an
older step is read instead.

Of several processes only the first reads and writes, so that no other process needs
the directory. It sends the arrays that it reads to the others, and arrays that are
sharded over processes are gathered for it. All processes have to make the same calls.

Orbax only writes and reads single directories, and it writes on one thread of ours.
Its checkpoint managers are not used: one skips a save while another is in flight, one
deletes the newest step when it keeps the best one, both cast on restore, and both lose
a save in flight when the interpreter ends.
"""

import atexit
import contextlib
import json
import operator
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import jax
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, message, positive_int
from hintjax.processes import first, told
from hintjax.training.arrays import (
    Leaf,
    entries,
    fetch,
    flatten,
    kind_of,
    nest,
    placed_like,
)
from hintjax.training.bank_rows import resized, with_rows
from hintjax.training.sealed import (
    ORBAX,
    RECORD,
    STAGING,
    DamageError,
    commit,
    make_staging,
    read_arrays,
    read_record,
    resolve,
)

_DAMAGED = ".damaged"
_SHOWN = 10  # differences that an error lists at most

# Saves whose outcome has not been raised or returned yet.
_UNTOLD: set[Future] = set()


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run; made by `open_checkpoints`.

    Every method that reads waits for a save in flight first.
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
        """Copies `tree` to the host, and writes it and `extra` in the background.

        The arrays may be donated as soon as the call returns. A save in flight is
        waited for. If that save failed, its error is raised here and the new save has
        not started.

        Args:
          step: the number of the step, above every step that is there.
          tree: arrays, also typed PRNG keys, in any pytree.
          extra: JSON values that are stored and read together with the tree.
          best: marks the step. The newest marked step is kept besides the latest
            `keep` steps.
        """
        step, newest = operator.index(step), max(self.steps(), default=-1)
        if step <= newest:
            do = f"Steps only grow, and nothing in {self.directory} is overwritten."
            raise Refusal(message("save", f"a step above {newest}", f"{step}", do))
        leaves, arrays = flatten("save", tree)
        record = {"best": best, "extra": _json(extra or {})}
        # Copied: a view of a CPU device's memory would prevent its donation.
        host = [array.copy() for array in fetch(arrays)]
        target, staging = self.directory / str(step), self.directory / STAGING
        told(partial(make_staging, "save", staging, target, host))
        if first():
            self._saving = self._thread.submit(
                self._write, staging, target, leaves, host, record
            )
            _UNTOLD.add(self._saving)

    def _write(
        self,
        staging: Path,
        target: Path,
        leaves: list[Leaf],
        host: list[np.ndarray],
        record: dict[str, Any],
    ) -> None:
        """Writes one step, on the thread of the saves."""
        try:
            self._set_aside()
            record["leaves"] = entries(leaves, host)
            commit("save", staging, target, nest(leaves, host), record)
            with contextlib.suppress(
                OSError
            ):  # the step is saved; the next save retires again
                self._retire(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _set_aside(self) -> None:
        """Renames the steps that a restore found damaged: they will be made again."""
        for step in self._damaged:
            path = self.directory / str(step)
            aside = path.with_name(f"{step}{_DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)  # left by earlier damage
            with contextlib.suppress(OSError):
                path.rename(aside)
        self._damaged.clear()

    def _retire(self, trash: Path) -> None:
        """Moves away the steps that are not kept, to be deleted there.

        A step that is half deleted must not look like a step. The newest step has just
        been written whole, and damaged steps have been set aside.
        """
        steps = self._steps()
        for step in set(steps) - {*steps[-self.keep :], self._best(steps)}:
            (self.directory / str(step)).rename(trash / f"{step}.retired")

    def _steps(self) -> list[int]:
        """The steps on the disk of this process, ascending."""
        if not self.directory.is_dir():
            return []
        # In a damaged step, one of the two files may be missing.
        found = [self.directory.glob(f"*/{name}") for name in (RECORD, ORBAX)]
        names = {file.parent.name for files in found for file in files}
        steps = {int(name) for name in names if name.isdecimal()}
        return sorted(steps - self._damaged)

    def _best(self, steps: list[int]) -> int | None:
        """The newest of these steps that was saved with ``best=True``."""
        for step in reversed(steps):
            with contextlib.suppress(DamageError):
                if read_record(self.directory / str(step))["best"]:
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
        """The directory of a step, or the directories of all, newest first."""
        steps = self.steps()
        if not steps:
            raise Refusal(message(caller, f"a checkpoint in {self.directory}", "none"))
        if step is not None and operator.index(step) not in steps:
            wanted = f"one of the steps {steps} in {self.directory}"
            raise Refusal(message(caller, wanted, str(step)))
        chosen = reversed(steps) if step is None else [operator.index(step)]
        return [self.directory / str(step) for step in chosen]

    def peek(self, step: SupportsIndex | None = None) -> dict[str, Any]:
        """Reads the `extra` of a step, by default the newest, but not its tree."""
        path = self._find("peek", step)[0]
        return told(lambda: read_record(path), DamageError)["extra"]

    def restore(
        self,
        like: PyTree | Callable[[dict[str, Any]], PyTree],
        step: SupportsIndex | None = None,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step, by default the newest, into the structure of `like`.

        If the newest step is damaged, the newest whole step is read instead, with a
        warning. The next save renames the damaged steps to ``<step>.damaged``.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`, or a function from a step's
            `extra` to such a tree. Its values are not read, so the arrays may have been
            donated. Every array is placed like its counterpart in this tree.
          step: the step to read; None for the newest one.

        Returns:
          The saved tree, equal in every bit, and its `extra`.

        Raises:
          DamageError: the step is damaged, or every step is.
          ValueError: paths, shapes or dtypes differ (nothing is cast, and nothing is
            restored in part), or there is no such step. Only the number of rows of
            zeros with which a memory bank ends may differ: it depends on the mesh.
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
                went = f"went back to step {path.name}, the newest whole step"
                warnings.warn(f"{errors}\nrestore: {went}.", stacklevel=2)
            return tree, extra
        errors = "\n".join(map(str, damaged.values()))
        wanted = f"a checkpoint in {self.directory} that is whole"
        raise DamageError(message("restore", wanted, f"none:\n{errors}"))

    def poll(self) -> None:
        """Raises OSError if a save has failed, without waiting for one.

        Several processes have to raise together. There the next call that waits raises
        the error instead.
        """
        if jax.process_count() == 1 and self._saving and self._saving.done():
            self._wait()

    def wait(self) -> None:
        """Waits until no save is in flight; raises OSError if the save failed."""
        told(self._wait)

    def _wait(self) -> None:
        """Waits in this process only."""
        if self._saving is None:
            return
        error = self._saving.exception()
        _UNTOLD.discard(self._saving)
        self._saving = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the save of this process, as the end of a ``with`` block does."""
        self._wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._wait()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(
                str(failure)
            )  # the error that ended the block stays the error


def open_checkpoints(directory: str | os.PathLike, *, keep: int = 2) -> Checkpoints:
    """Opens the checkpoints in `directory`; the first save makes the directory.

    Args:
      directory: a local directory; relative paths and ``~`` are resolved now.
      keep: the number of latest steps that are kept, besides the best step.

    >>> import jax.numpy as jnp
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
    path = resolve("open_checkpoints", directory)
    if path.exists() and not path.is_dir():
        raise Refusal(message("open_checkpoints", "a directory", f"the file {path}"))
    return Checkpoints(path, keep)


def _json(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `extra`, as it will be read back from JSON."""
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        wanted = "extra to hold JSON values"
        raise WrongType(message("save", wanted, str(error))) from error


def _restore(path: Path, like: Any) -> tuple[PyTree, dict[str, Any]]:
    """Reads one step into the structure of `like`, with its `extra`."""
    record = told(lambda: read_record(path), DamageError)
    like = like(record["extra"]) if callable(like) else like
    leaves, targets = flatten("restore", like)
    others = resized(record["leaves"], like)
    _refuse_other(path, record["leaves"], leaves, others)
    stored, _ = read_arrays(path, record)
    values = []
    for leaf, target in zip(leaves, targets, strict=True):
        value, key = stored[leaf.path]
        if leaf.path in others:
            value = with_rows(leaf.path, value, leaf.shape[0])
        values.append(placed_like(leaf.path, value, key, target))
    return jax.tree.unflatten(jax.tree.structure(like), values), record["extra"]


def _refuse_other(
    path: Path,
    stored: list[dict],
    wanted: list[Leaf],
    others: frozenset[tuple[str, ...]],
) -> None:
    """Raises, with the differences, unless the two trees have the same structure.

    Args:
        path: the directory of the step.
        stored: the leaves that the record lists.
        wanted: the leaves to restore.
        others: the paths of leaves that may differ.
    """
    there = {tuple(x["path"]): kind_of(x["dtype"], x["shape"]) for x in stored}
    here = {leaf.path: kind_of(leaf.dtype, leaf.shape) for leaf in wanted}
    differences = [
        f"{'/'.join(leaf)}: {there.get(leaf, 'nothing')} stored, "
        f"{here.get(leaf, 'nothing')} wanted"
        for leaf in sorted(there.keys() | here.keys())
        if there.get(leaf) != here.get(leaf) and leaf not in others
    ]
    if not differences:
        return
    shown = differences[:_SHOWN]
    if len(differences) > _SHOWN:
        shown.append(f"and {len(differences) - _SHOWN} more")
    do = "Build `like` from the models, the method and the optimizer that were saved."
    got = "\n  ".join([f"{len(differences)} differences:", *shown]) + "\n"
    raise Refusal(message("restore", f"the tree in {path}", got, do))


def _finish() -> None:
    """Waits for saves in flight at exit, and prints failures not yet raised."""
    for saving in tuple(_UNTOLD):
        error = saving.exception()
        if error is not None:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)


# Orbax starts threads, and no thread starts once the interpreter shuts down, which is
# before atexit. So a save in flight has to end earlier.
getattr(threading, "_register_atexit", atexit.register)(_finish)
