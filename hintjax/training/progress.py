"""Progress of a run: a bar on a terminal, plain lines anywhere else."""

import collections
import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsInt

from hintjax.training.metrics import on_host


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
      total: the number of steps of the whole run.
      description: the name of the current work.
      start: the steps that a resumed run has done before.
      images_per_step: the batch size, to show images/s; 0 hides images/s.
      every: seconds between two plain lines.
      stream: the file to write to; by default stderr.

    Yields:
      `report(step, metrics=None, new_description=None)`. Call it with the steps done so
      far, whenever metrics have reached the host for another reason, never just for the
      bar. It shows the metrics whose names have no slash: the total loss and each term.
    """
    # Speed over the last reports only: the first step compiles, and phases differ.
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
    """Gives a function that shows (step, description, text) on the stream."""
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
            # On a narrow terminal the end of this text is cut off.
            table_column=table.Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
    )
    with progress.Progress(*columns, console=terminal, expand=True) as bar:
        task = bar.add_task(description, total=total, completed=start, text="")
        yield lambda step, description, text: bar.update(
            task, completed=step, description=description, text=text
        )


def _plain_lines(
    total: int, every: SupportsFloat, stream: Any
) -> Callable[[int, str, str], None]:
    """A function that prints a line, unless the last one is too recent."""
    last = -math.inf

    def show(step: int, description: str, text: str) -> None:
        nonlocal last
        if step >= total or time.perf_counter() - last >= float(every):
            last = time.perf_counter()
            print(f"{description}: {step}/{total}  {text}", file=stream, flush=True)

    return show


def _terms(metrics: Mapping[str, Any]) -> str:
    """The metrics without a slash in their name, as text."""
    return "  ".join(
        f"{name} {float(value):.4g}"
        for name, value in on_host(metrics).items()
        if "/" not in name
    )


def _speed(
    seen: Sequence[tuple[float, int]], total: int, images_per_step: int
) -> tuple[str, str]:
    """The time left and the speed over some reports, as texts."""
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
    """A number with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
