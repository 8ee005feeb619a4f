"""What a run says about itself: its metrics on disk, a progress bar, and statistics.

One line of ``metrics.jsonl`` is one report: ``{"step": 40, "stage": "hint", "time":
1700000000.0, "loss": 0.5, "hint/r2": 0.9}``. The same numbers go to TensorBoard, under
``stage/name``, when tensorboardX is installed.
"""

import collections
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat, SupportsInt, TextIO

import jax
import numpy as np
from jaxtyping import ArrayLike

from hintjax._checks import message
from hintjax.processes import first

FILE = "metrics.jsonl"
Numbers = Sequence[SupportsFloat] | np.ndarray
_RESERVED = ("step", "stage", "time")


class MetricsWriter(contextlib.AbstractContextManager):
    """The open metrics of one run; made by `open_metrics`."""

    def __init__(self, lines: TextIO, events: Any = None):
        self._lines = lines
        self._events = events

    def write(
        self, step: SupportsInt, stage: str, metrics: Mapping[str, ArrayLike]
    ) -> None:
        """Appends one line, flushed: a killed process loses nothing it has written.

        Args:
          step: the step of the run, counted through all its stages.
          stage: the name of the stage, e.g. "hint" or "distillation".
          metrics: scalars by name, on the host or on a device (one transfer for all).
            What is not finite is written as null: JSON has no word for it.
        """
        values = {name: _number(name, v) for name, v in _on_host(metrics).items()}
        head = {"step": int(step), "stage": stage, "time": round(time.time(), 3)}
        self._lines.write(json.dumps(head | values, allow_nan=False) + "\n")
        self._lines.flush()
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{stage}/{name}", value, int(step))

    def close(self) -> None:
        """Closes the files; calling it twice is harmless."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __exit__(self, *exception) -> None:
        self.close()


def open_metrics(
    run_dir: str | os.PathLike, *, resume: int | None = None, tensorboard: bool = True
) -> MetricsWriter:
    """Opens the metrics of a run for appending.

    Of several processes only the first keeps what it writes.

    Args:
      run_dir: the directory of the run; made when it is not there.
      resume: None for a new run. A restored step, to go on from it: lines of later
        steps are removed (they will be written again), and so is a line that was
        half written when the process died. 0 or -1 when nothing was restored.
      tensorboard: whether to write TensorBoard events too, if tensorboardX is there.

    Returns:
      A writer with `write(step, stage, metrics)` and `close()`; a context manager.
    """
    if not first():
        return MetricsWriter(pathlib.Path(os.devnull).open("a", encoding="utf-8"))
    path = pathlib.Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        _truncate(path, resume)
    elif path.exists() and path.stat().st_size:
        raise ValueError(
            message(
                "open_metrics",
                "a run directory without metrics",
                str(path),
                "Choose another directory, or pass the restored step as resume=.",
            )
        )
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
    """Reads the lines of a run, oldest first, without a half-written last one."""
    path = pathlib.Path(run_dir) / FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: pathlib.Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
    return [line for line in lines if line.endswith("\n")]


def _truncate(path: pathlib.Path, step: int) -> None:
    """Keeps the lines up to a step; the file is replaced whole or not at all."""
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    new = path.with_suffix(".tmp")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def _on_host(metrics: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """One transfer for all, in the order given (a tree_map would sort the names)."""
    return dict(zip(metrics, jax.device_get(list(metrics.values())), strict=True))


def _number(name: str, value: ArrayLike) -> int | float | None:
    value = np.asarray(value)
    if name in _RESERVED or value.ndim != 0:
        raise ValueError(
            message(
                "MetricsWriter.write",
                f"scalars under names other than {', '.join(_RESERVED)}",
                f"{name!r} of shape {value.shape}",
                "Rename the metric, or reduce it to one number.",
            )
        )
    if value.dtype == bool or np.issubdtype(value.dtype, np.integer):
        return int(value)
    # Through the shortest text of its own precision: 0.1, not 0.10000000149011612.
    number = float(str(value[()]))
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def progress(
    total: int,
    description: str,
    *,
    start: int = 0,
    images_per_step: int = 0,
    every: SupportsFloat = 10.0,
    stream: Any = None,
) -> Iterator[Callable[..., None]]:
    """Shows how far a run is: a bar on a terminal, plain lines anywhere else.

    Args:
      total: the number of steps when all is done.
      description: what is running.
      start: the steps that were done before (a resumed run).
      images_per_step: the batch size, to show images/s; 0 to leave it out.
      every: seconds between two plain lines.
      stream: where to write; stderr unless given.

    Yields:
      `report(step, metrics=None, new_description=None)`: call it with the steps done so
      far, whenever metrics have reached the host anyway, never just for the bar. It
      shows the metrics whose names have no slash: the total and each term of the loss.
    """
    # Speed over the last reports only: the first step compiles, and stages differ.
    seen = collections.deque([(time.perf_counter(), start)], maxlen=10)
    terms = ""

    with _display(total, description, start, every, stream or sys.stderr) as show:

        def report(
            step: SupportsInt,
            metrics: Mapping[str, Any] | None = None,
            new_description: str | None = None,
        ) -> None:
            nonlocal description, terms
            seen.append((time.perf_counter(), int(step)))
            description = new_description or description
            terms = _terms(metrics) if metrics else terms
            left, speed = _speed(seen, total, images_per_step)
            text = "  ".join(filter(None, (left, terms, speed)))
            show(int(step), description, text)

        yield report


@contextlib.contextmanager
def _display(
    total: int, description: str, start: int, every: SupportsFloat, stream: Any
) -> Iterator[Callable[[int, str, str], None]]:
    """A function that shows (step, description, text), on whatever there is."""
    if importlib.util.find_spec("rich") is None or not stream.isatty():
        yield _plain_lines(total, every, stream)
        return
    from rich import console, progress, table

    terminal = console.Console(file=stream)
    if terminal.is_dumb_terminal:
        yield _plain_lines(total, every, stream)
        return
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24 if terminal.width >= 100 else 8),
        progress.MofNCompleteColumn(),
        progress.TextColumn(
            "{task.fields[text]}",
            markup=False,
            # What a narrow terminal has no room for is cut here, at the end.
            table_column=table.Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    with progress.Progress(*columns, console=terminal, expand=True) as bar:
        task = bar.add_task(description, total=total, completed=start, text="")
        yield lambda step, description, text: bar.update(
            task, completed=step, description=description, text=text
        )


def _plain_lines(total: int, every: SupportsFloat, stream: Any):
    last = -math.inf

    def show(step: int, description: str, text: str) -> None:
        nonlocal last
        if step >= total or time.perf_counter() - last >= every:
            last = time.perf_counter()
            print(f"{description}: {step}/{total}  {text}", file=stream, flush=True)

    return show


def _terms(metrics: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {float(value):.4g}"
        for name, value in _on_host(metrics).items()
        if "/" not in name
    )


def _speed(
    seen: Sequence[tuple[float, int]], total: int, images_per_step: int
) -> tuple[str, str]:
    (then, before), (now, step) = seen[0], seen[-1]
    if step <= before or now <= then:
        return "", ""
    speed = (step - before) / (now - then)
    left = round(max(total - step, 0) / speed)
    text = f"{_three_digits(speed)} steps/s"
    if images_per_step:
        text += f"  {speed * images_per_step:,.0f} images/s"
    return f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}", text


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Summary(NamedTuple):
    """The mean of one value per seed, with its 95 % t-interval."""

    count: int
    mean: float
    std: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean of the differences a - b over the same seeds, with its 95 % t-interval.

    `told_apart` is whether the interval leaves out 0, and `verdict` says it in words.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float
    told_apart: bool
    verdict: str


def summary(values: Numbers) -> Summary:
    r"""Mean, sample standard deviation and 95 % t-interval of one value per seed.

    $$\bar x \pm t_{0.975,\,n-1}\, s / \sqrt{n}$$

    Args:
      values: one finite number per seed, at least one.

    Returns:
      A `Summary`. Of one value the spread is unknown: std is nan, the interval is
      the whole line.

    >>> [round(x, 3) for x in summary([0.90, 0.92, 0.94])]
    [3, 0.92, 0.02, 0.87, 0.97]
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            message(
                "summary",
                "one number per seed",
                f"shape {values.shape}",
                "Pass a non-empty list of numbers.",
            )
        )
    count, mean = values.size, float(values.mean())
    if count == 1:
        return Summary(1, mean, math.nan, -math.inf, math.inf)
    std = float(values.std(ddof=1))
    half = _t_quantile(count - 1) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


def paired(a: Numbers, b: Numbers) -> Paired:
    """Compares two arms over the same seeds, by the differences seed by seed.

    What a seed does to both arms cancels, so fewer seeds tell two arms apart.

    Args:
      a: one number per seed.
      b: the numbers of the other arm, for the same seeds in the same order.

    Returns:
      A `Paired`; its verdict is "higher", "lower" or "cannot be told apart" (the
      interval contains 0, as it always does with one seed).

    >>> paired([0.95, 0.96, 0.94], [0.90, 0.92, 0.88]).verdict
    'higher'
    >>> paired([0.95, 0.91, 0.94], [0.90, 0.92, 0.95]).verdict
    'cannot be told apart'
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            message(
                "paired",
                "the same seeds in both arms",
                f"shapes {a.shape} and {b.shape}",
                "Compare the seeds that both have.",
            )
        )
    result = summary(a - b)
    # Written so that nan falls on the careful side.
    told_apart = result.low > 0 or result.high < 0
    verdict = "higher" if result.mean > 0 else "lower"
    return Paired(*result, told_apart, verdict if told_apart else _UNDECIDED)


_UNDECIDED = "cannot be told apart"
# Student's t at 0.975 for 1 to 9 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def _t_quantile(freedom: int) -> float:
    """Student's t at 0.975: a table, then Cornish and Fisher's expansion (to 1e-4)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
