"""Pacing: how many steps one dispatch makes, and how far the host runs ahead.

On a CPU every step is its own asynchronous dispatch (convolutions inside a scan are
many times slower there); on an accelerator one dispatch is a scan of about a second
of steps. The host waits for the device once per report, never per step, unless steps
are so long that a signal would wait behind seconds of them.
"""

import collections
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, ArrayLike

from hintjax.processes import told
from hintjax.stages import State
from hintjax.training.feeds import Feed
from hintjax.training.keeping import Keeper
from hintjax.training.ledger import Now
from hintjax.training.phase import Phase

BEHIND = 1.0  # seconds of work that a signal may have to wait for
MEASURED = 8  # single steps that say how long a step takes on this accelerator


class Every(NamedTuple):
    """The numbers of steps after which a run pauses; None where nothing is due."""

    report: int
    evaluation: int
    checkpoint: int
    balance: int | None = None

    def periods(self) -> list[int]:
        """The numbers of steps, without None."""
        return [every for every in self if every is not None]

    def pauses(self, at: int) -> bool:
        """Whether the run pauses at this step."""
        return any(at % every == 0 for every in self.periods())


class Pace:
    """Makes the steps of one phase, as many at once as signals and reports allow.

    Attributes:
        phase: the phase.
        feed: the batches.
        keeper: is asked before every dispatch whether a signal ends the run.
        every: the pauses of the run.
        single: whether each step is a dispatch of its own, however short it is.
    """

    def __init__(
        self, phase: Phase, feed: Feed, keeper: Keeper, every: Every, *, single: bool
    ):
        self.phase = phase
        self.feed = feed
        self.keeper = keeper
        self.every = every
        self.single = single
        self._timer: Timer | None = None  # since the last report
        self._calls = 0  # dispatches of the phase
        self._ahead: collections.deque = collections.deque()  # not waited for yet
        self._most: int | None = None  # how many those may be, once measured

    def stride(
        self, state: State, now: Now
    ) -> tuple[State, Now, Mapping[str, ArrayLike]]:
        """Makes the steps up to the next report, and waits for them.

        Args:
            state: the state of the phase; donated.
            now: where the run stands.

        Returns:
            The new state, where the run stands, and the last step's metrics on the
            host.
        """
        self._timer = self._timer and Timer()
        end = now.end(self.phase)
        paused = False
        while not paused:
            # No dispatch reaches over a pause or over the end of an epoch.
            periods = (*self.every.periods(), self.feed.per_epoch)
            stop = min(end, *(now.at - now.at % n + n for n in periods))
            while now.at < stop:
                state, now, metrics = self._dispatch(state, now, stop)
            paused = now.at == end or self.every.pauses(now.at)
        metrics = jax.device_get(metrics)
        self._ahead.clear()
        waited = self.feed.waited()
        spent = 0.0 if self._timer is None else self._timer.seconds()
        seconds = now.seconds + spent - waited
        return state, now._replace(seconds=seconds).spend("data", waited), metrics

    def _dispatch(
        self, state: State, now: Now, stop: int
    ) -> tuple[State, Now, Mapping[str, Array]]:
        """Makes one dispatch, which does not reach over the step `stop`."""
        meet = self._most is not None and self._calls % self._most == 0
        self.keeper.heed(state, now, meet=meet)
        start = time.perf_counter()
        count = 1 if self.single else now.dispatch or 1
        count = count if now.at + count <= stop else 1
        state, metrics = self.feed.advance(
            self.phase.program, state, self.phase.teacher, now.at, count
        )
        self.keeper.checkpoints.poll()
        self._calls += 1
        return state, self._wait(now.moved(count), metrics, start), metrics

    def _wait(self, now: Now, metrics: Mapping[str, Array], start: float) -> Now:
        """Waits for the device where that is due, and learns from how long it took."""
        self._ahead.append(metrics)
        if self._most is not None and len(self._ahead) > self._most:
            jax.block_until_ready(self._ahead.popleft())
        if self._timer is None:  # the first dispatch of a phase compiles
            jax.block_until_ready(metrics)
            self.feed.waited()  # the wait for its batch is in the same seconds
            self._timer = Timer()
            now = now.spend("compilation", time.perf_counter() - start)
        elif self._most is None:
            jax.block_until_ready(metrics)
            rate = self._timer.calls() / max(self._timer.seconds(), 1e-9)
            self._most = told(partial(max, 2, int(BEHIND * rate)))
        elif now.dispatch is None and self._timer.calls() == MEASURED:
            jax.block_until_ready(metrics)
            now = now._replace(dispatch=told(self._timer.steps_in_a_second))
        return now


class Timer:
    """Counts seconds and calls since it was made."""

    def __init__(self):
        self._start, self._calls = time.perf_counter(), 0

    def seconds(self) -> float:
        """The seconds since the timer was made."""
        return time.perf_counter() - self._start

    def calls(self) -> int:
        """Counts one more call, and returns their number."""
        self._calls += 1
        return self._calls

    def steps_in_a_second(self) -> int:
        """The power of two at or below the calls in a second, at most 256."""
        steps = self._calls / max(self.seconds(), 1e-9)
        return 2 ** int(math.log2(min(max(steps, 1), 256)))
