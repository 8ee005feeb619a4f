"""Metrics: the numbers that a run reports, on disk.

One line of ``metrics.jsonl`` is one report: ``{"step": 40, "stage": "hint", "time":
1700000000.0, "loss": 0.5, "hint/r2": 0.9}``, where "stage" is the name of the phase.
The same numbers go to TensorBoard, as ``phase/name``, when tensorboardX is installed.
"""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, SupportsInt, TextIO

import jax
import numpy as np
from jaxtyping import ArrayLike

from hintjax._checks import Refusal, message
from hintjax.processes import first

FILE = "metrics.jsonl"
_RESERVED = ("step", "stage", "time")


class MetricsWriter(contextlib.AbstractContextManager):
    """The open metrics of one run; made by `open_metrics`."""

    def __init__(self, lines: TextIO, events: Any = None):
        self._lines = lines
        self._events = events

    def write(
        self, step: SupportsInt, phase: str, metrics: Mapping[str, ArrayLike]
    ) -> None:
        """Appends one line and flushes it, so that a killed process does not lose it.

        Args:
          step: the step of the run, counted through all its phases.
          phase: the name of the phase, e.g. "hint" or "distillation".
          metrics: scalars by name, on the host or on a device (one transfer for all).
            Numbers that are not finite are written as null, since JSON has none.
        """
        values = {name: _number(name, v) for name, v in on_host(metrics).items()}
        head = {"step": int(step), "stage": phase, "time": round(time.time(), 3)}
        self._lines.write(json.dumps(head | values, allow_nan=False) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{phase}/{name}", value, int(step))

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_metrics(
    run_dir: str | os.PathLike, *, resume: int | None = None, tensorboard: bool = True
) -> MetricsWriter:
    """Opens the metrics of a run for appending.

    Of several processes only the first writes; the writers of the others drop lines.

    Args:
      run_dir: the directory of the run; it is made if it does not exist.
      resume: None for a new run, or the restored step of a run that goes on. Lines of
        later steps are removed, because they will be written again, and so is a line
        that was half written when the process died. 0 or -1 if nothing was restored.
      tensorboard: whether to write TensorBoard events, too, if tensorboardX is
        installed.

    Returns:
      A writer with `write(step, phase, metrics)` and `close()`; a context manager.
    """
    if not first():
        return MetricsWriter(pathlib.Path(os.devnull).open("a", encoding="utf-8"))
    path = pathlib.Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        _truncate(path, resume)
    elif path.exists() and path.stat().st_size:
        wanted = "a run directory without metrics"
        do = "Choose another directory, or pass the restored step as resume=."
        raise Refusal(message("open_metrics", wanted, str(path), do))
    events = None
    if tensorboard and importlib.util.find_spec("tensorboardX") is not None:
        import tensorboardX

        # purge_step tells TensorBoard to forget the events of steps that run again.
        purge = None if resume is None else resume + 1
        events = tensorboardX.SummaryWriter(
            str(path.parent / "tensorboard"), purge_step=purge, flush_secs=10
        )
    return MetricsWriter(path.open("a", encoding="utf-8"), events)


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a run, oldest first, without a half-written last line."""
    path = pathlib.Path(run_dir) / FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: pathlib.Path) -> list[str]:
    """The lines that end with a newline."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
    return [line for line in lines if line.endswith("\n")]


def _truncate(path: pathlib.Path, step: int) -> None:
    """Keeps the lines up to a step; the file is replaced as a whole or not at all."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    new = path.with_suffix(".tmp")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def on_host(metrics: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Copies metrics to the host in one transfer, in the order given."""
    # A tree_map would sort the names.
    return dict(zip(metrics, jax.device_get(list(metrics.values())), strict=True))


def _number(name: str, value: ArrayLike) -> int | float | None:
    """A metric as JSON holds it; None if it is not finite."""
    value = np.asarray(value)
    if name in _RESERVED or value.ndim != 0:
        wanted = f"scalars under names other than {', '.join(_RESERVED)}"
        got = f"{name!r} of shape {value.shape}"
        do = "Rename the metric, or reduce it to one number."
        raise Refusal(message("MetricsWriter.write", wanted, got, do))
    if value.dtype == bool or np.issubdtype(value.dtype, np.integer):
        return int(value)
    # Through the shortest text in its own precision: 0.1, not 0.10000000149011612.
    number = float(str(value[()]))
    return number if math.isfinite(number) else None
