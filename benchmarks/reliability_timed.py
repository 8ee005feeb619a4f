"""The command `hintjax`, with a log of where its time goes.

    python benchmarks/reliability_timed.py LOG FEED resume RUN_DIR

FEED is `on_device`, as the command itself runs, or `streamed`, which reads the training
set with Grain, as if it did not fit on the device. The log has one line for each event:
`span NAME START END` and `step STEP TIME`, in seconds of a clock that all processes of
the machine share. A killed process loses no line that it has written.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The command imports these only when it needs them; here they count as imports.
import grain
import jax
import tensorboardX
import tyro

from hintjax import cli
from hintjax.experiments import run
from hintjax.training import Checkpoints, checkpoints, feeds, loop, sealed
from hintjax.training.metrics import MetricsWriter

LATE = (grain, tensorboardX, tyro)


class Log:
    """A file of lines, each written at once."""

    def __init__(self, path: Path) -> None:
        """Opens the file to append to it."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, *words: object) -> None:
        """Writes one line."""
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which also writes a line at every call."""

        def call(*arguments: Any, **how: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **how)
            finally:
                self("span", name, start, time.perf_counter())

        return call


class Waiting:
    """An iterator of Grain that writes a line whenever the device waits for a batch.

    Steps are dispatched ahead: a late batch delays nothing while an earlier step runs.
    If the last step ends before the batch comes, the whole wait counts.
    """

    def __init__(self, batches: Any, log: Log) -> None:
        """Follows the iterator `batches`."""
        self._batches, self._log = batches, log
        self.close = batches.close
        self.dispatched = ()  # the results of the last step

    def __next__(self) -> Any:
        """The next batch."""
        start = time.perf_counter()
        batch = next(self._batches)
        if all(array.is_ready() for array in self.dispatched):
            self._log("span", "data", start, time.perf_counter())
        return batch


def listen(log: Log, feed: str) -> None:
    """Makes every part of a run write to the log."""

    def compiled(event: str, seconds: float, **_: object) -> None:
        # Tracing, lowering and compiling; their spans contain each other.
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            log("span", "compilation", now - seconds, now)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    for name, owner, attribute in (
        ("restore", Checkpoints, "restore"),
        ("latest", Checkpoints, "latest"),  # waits for a save that is in flight
        ("save", Checkpoints, "save"),
        ("writing", checkpoints, "commit"),  # on its own thread
        ("checksums", sealed, "_sums"),
        ("evaluation", loop, "evaluate"),
    ):
        setattr(owner, attribute, log.timed(name, getattr(owner, attribute)))
    read_ahead, write = feeds.read_ahead, MetricsWriter.write
    fits = run.fits_on_device

    def telling_write(self, step, *rest):
        write(self, step, *rest)
        log("step", int(step), time.perf_counter())

    MetricsWriter.write = telling_write
    waiting = []

    def telling_read_ahead(*rest):
        waiting.append(Waiting(read_ahead(*rest), log))
        return waiting[-1]

    feeds.read_ahead = telling_read_ahead
    if feed == "streamed":
        run.fits_on_device = lambda split, limit=0: fits(split, limit=limit)
    for name in ("on_device", "streamed"):
        setattr(run, name, _followed(getattr(run, name), log, waiting))


def _followed(
    make: Callable[..., feeds.Feed], log: Log, waiting: list[Waiting]
) -> Callable[..., feeds.Feed]:
    """A maker of feeds that log their first step and keep the results of the last."""

    def made(*arguments: Any) -> feeds.Feed:
        feed, told = make(*arguments), []

        def advance(*where: Any) -> Any:
            if not told:
                told.append(log("first", time.perf_counter()))
            state, metrics = feed.advance(*where)
            for batches in waiting:
                batches.dispatched = tuple(metrics.values())
            return state, metrics

        return feed._replace(advance=advance)

    return made


def main() -> None:
    """Runs the command; its arguments follow the names of the log and the feed."""
    path, feed, *arguments = sys.argv[1:]
    log = Log(Path(path))
    listen(log, feed)
    log("imported", time.perf_counter())
    cli.main(arguments)


if __name__ == "__main__":
    main()
