"""The command `hintjax`, which writes down what its time goes into.

    python benchmarks/reliability_timed.py LOG FEED resume RUN_DIR

FEED is `on_device`, which takes the run as the command does, or `streamed`, which
reads its training set by Grain, as if it did not fit on the device. One line for each
event: `span NAME START END` and `step STEP TIME`, in seconds of a clock that all
processes of the machine share. A killed process loses no line that it has written.
"""

import os
import sys
import time
from pathlib import Path

# What the command imports only when it needs it: all of it counts as imports.
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
    """Lines in a file, each in one write."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def timed(self, name, function):
        """The same function, with a line for every call."""

        def call(*arguments, **how):
            start = time.perf_counter()
            try:
                return function(*arguments, **how)
            finally:
                self("span", name, start, time.perf_counter())

        return call


class Waiting:
    """An iterator of Grain's, with a line where the device had to wait for a batch.

    Steps are dispatched ahead: while one of them runs, a batch that is late keeps
    nothing from going on. If the last one ends in the meantime, all of the wait counts.
    """

    def __init__(self, batches, log: Log):
        self._batches, self._log = batches, log
        self.get_state, self.set_state = batches.get_state, batches.set_state
        self.dispatched = ()  # what the last step gives

    def __next__(self):
        start = time.perf_counter()
        batch = next(self._batches)
        if all(array.is_ready() for array in self.dispatched):
            self._log("span", "data", start, time.perf_counter())
        return batch


def listen(log: Log, feed: str) -> None:
    """Makes every part of a run tell of itself."""

    def compiled(event: str, seconds: float, **_: object) -> None:
        # Tracing, lowering and compiling; they hold one another.
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
    stream, write, fits = feeds.stream, MetricsWriter.write, run.fits_on_device

    def telling_write(self, step, *rest):
        write(self, step, *rest)
        log("step", int(step), time.perf_counter())

    MetricsWriter.write = telling_write
    waiting = []

    def telling_stream(*rest, **how):
        waiting.append(Waiting(stream(*rest, **how), log))
        return waiting[-1]

    feeds.stream = telling_stream
    if feed == "streamed":
        run.fits_on_device = lambda split: fits(split, limit=0)
    for name in ("on_device", "streamed"):
        setattr(run, name, _followed(getattr(run, name), log, waiting))


def _followed(make, log, waiting):
    """A feed that tells when its first step is asked for, and what was dispatched."""

    def made(*arguments):
        feed, told = make(*arguments), []

        def advance(*where):
            if not told:
                told.append(log("first", time.perf_counter()))
            state, metrics = feed.advance(*where)
            for batches in waiting:
                batches.dispatched = tuple(metrics.values())
            return state, metrics

        return feed._replace(advance=advance)

    return made


def main() -> None:
    """The command, after the name of the log and of the feed."""
    path, feed, *arguments = sys.argv[1:]
    log = Log(Path(path))
    listen(log, feed)
    log("imported", time.perf_counter())
    cli.main(arguments)


if __name__ == "__main__":
    main()
