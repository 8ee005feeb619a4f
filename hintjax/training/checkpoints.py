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
_SHOWN = 10  # differences that an error lists

# Saves whose outcome nobody has been told yet.
_UNTOLD: set[Future] = set()


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
            raise Refusal(message("save", f"a step above {newest}", f"{step}", do))
        leaves, arrays = flatten("save", tree)
        record = {"best": best, "extra": _json(extra or {})}
        # A view of a CPU device's memory would keep that memory from being donated.
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
        try:
            self._set_aside()
            record["leaves"] = entries(leaves, host)
            commit("save", staging, target, nest(leaves, host), record)
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
        found = [self.directory.glob(f"*/{name}") for name in (RECORD, ORBAX)]
        names = {file.parent.name for files in found for file in files}
        steps = {int(name) for name in names if name.isdecimal()}
        return sorted(steps - self._damaged)

    def _best(self, steps: list[int]) -> int | None:
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
        """The directory of a step, or those of all, the newest first."""
        steps = self.steps()
        if not steps:
            raise Refusal(message(caller, f"a checkpoint in {self.directory}", "none"))
        if step is not None and operator.index(step) not in steps:
            wanted = f"one of the steps {steps} in {self.directory}"
            raise Refusal(message(caller, wanted, str(step)))
        chosen = reversed(steps) if step is None else [operator.index(step)]
        return [self.directory / str(step) for step in chosen]

    def peek(self, step: SupportsIndex | None = None) -> dict[str, Any]:
        """The `extra` of a step, the newest if None, without reading its tree.

        It says which stage wrote the step.
        """
        path = self._find("peek", step)[0]
        return told(lambda: read_record(path), DamageError)["extra"]

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
    path = resolve("open_checkpoints", directory)
    if path.exists() and not path.is_dir():
        raise Refusal(message("open_checkpoints", "a directory", f"the file {path}"))
    return Checkpoints(path, keep)


def _json(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy as JSON will give it back."""
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        wanted = "extra to hold what JSON can"
        raise WrongType(message("save", wanted, str(error))) from error


def _restore(path: Path, like: Any) -> tuple[PyTree, dict[str, Any]]:
    """One step in the structure of `like`, with its `extra`."""
    record = told(lambda: read_record(path), DamageError)
    like = like(record["extra"]) if callable(like) else like
    leaves, targets = flatten("restore", like)
    _refuse_other(path, record["leaves"], leaves)
    stored, _ = read_arrays(path, record)
    values = [
        placed_like(leaf.path, *stored[leaf.path], target)
        for leaf, target in zip(leaves, targets, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), values), record["extra"]


def _refuse_other(path: Path, stored: list[dict], wanted: list[Leaf]) -> None:
    """Raise, listing the differences, unless the two have one structure."""
    there = {tuple(x["path"]): kind_of(x["dtype"], x["shape"]) for x in stored}
    here = {leaf.path: kind_of(leaf.dtype, leaf.shape) for leaf in wanted}
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
    raise Refusal(message("restore", f"the tree in {path}", got, do))


def _finish() -> None:
    """Lets a save in flight end, and tells of failures that nobody asked for."""
    for saving in tuple(_UNTOLD):
        error = saving.exception()
        if error is not None:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)


# Orbax needs threads, and none start once the interpreter shuts down, which is before
# atexit: what is in flight has to end earlier.
getattr(threading, "_register_atexit", atexit.register)(_finish)
