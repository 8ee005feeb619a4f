"""Keeps a run: saves it, restores it, and saves it before a signal ends it."""

import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from hintjax._checks import Refusal, message
from hintjax.processes import largest, told
from hintjax.stages import State
from hintjax.training.checkpoints import Checkpoints
from hintjax.training.ledger import Now
from hintjax.training.metrics import read_metrics
from hintjax.training.signals import Request

# Metrics that have reached the host but not yet their report.
Owed = Mapping[str, ArrayLike] | None


class Keeper:
    """Saves and restores one run.

    Attributes:
        run_dir: the run directory.
        checkpoints: the open checkpoints in it.
        request: tells whether a signal has asked the run to end.
        identity: all that must be equal when the run is resumed; JSON.
        seconds: how old the last checkpoint may become; None means any age.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        checkpoints: Checkpoints,
        request: Request,
        identity: Mapping[str, Any],
        seconds: float | None,
    ):
        self.run_dir = run_dir
        self.checkpoints = checkpoints
        self.request = request
        self.identity = identity
        self.seconds = seconds
        self._last = time.perf_counter()  # of the last save; at first, of the start

    def late(self) -> bool:
        """Whether the last checkpoint is too old."""
        age = time.perf_counter() - self._last
        return self.seconds is not None and age > self.seconds

    def save(self, state: State, now: Now, owed: Owed = None) -> Now:
        """Saves the run where it stands.

        A step that is there already was saved by the run that this one resumes.

        Args:
            state: the state of the phase.
            now: where the run stands.
            owed: metrics that a signal keeps from their report.

        Returns:
            Where the run stands, with the seconds that the save took.
        """
        start = self._last = time.perf_counter()
        if now.at <= (self.checkpoints.latest() or 0):  # waits for a save in flight
            return now
        lowest = now.is_lowest()
        now = now._replace(lowest=now.found if lowest else now.lowest)
        extra = {
            "now": now._asdict(),
            "of": self.identity,
            "owed": _packed(owed),
            "time": time.time(),
        }
        self.checkpoints.save(now.at, state, extra, best=lowest)
        return now.spend("checkpoints", time.perf_counter() - start)

    def heed(
        self, state: State, now: Now, owed: Owed = None, *, meet: bool = True
    ) -> None:
        """Ends the run if a signal has asked for that, but saves it first.

        Args:
            state: the state of the phase.
            now: where the run stands.
            owed: metrics that have not been reported yet.
            meet: whether all processes call this now. Several processes end only when
                they meet, so that all of them end at the same step.
        """
        asked = self.request.signal
        if jax.process_count() > 1:
            asked = (largest(asked or 0) or None) if meet else None
        if asked is not None:
            self.save(state, now, owed)
            self.checkpoints.wait()
            self.request.signal = asked
            saved = f"step {now.at} is saved, and resuming goes on from there"
            self.request.obey(saved)

    def restore(
        self, template: Callable[[int], State], harmless: Collection[str]
    ) -> tuple[State, Now, Owed]:
        """Goes back to the newest checkpoint that is whole.

        Args:
            template: `number of a phase -> state` of its shapes.
            harmless: names in the identity that may differ.

        Returns:
            The state, where the run stands, and metrics that have no report yet.
        """
        start, made = time.perf_counter(), [0.0]

        def like(extra: dict[str, Any]) -> State:
            _check_identity(self.run_dir, extra["of"], self.identity, harmless)
            begun = time.perf_counter()
            state = template(extra["now"]["phase"])
            made[0] += time.perf_counter() - begun
            return state

        state, extra = self.checkpoints.restore(like)
        now = Now(**extra["now"]).spend("compilation", made[0])
        now = now.spend("checkpoints", time.perf_counter() - start - made[0])
        lost = told(partial(_lost, self.run_dir, now.at, extra["time"]))
        return state, now.spend("lost", max(lost, 0.0)), _unpacked(extra["owed"])


def _lost(run_dir: str | os.PathLike[str], at: int, saved: float) -> float:
    """The seconds from a save to the last report: these steps are made again."""
    lines = [line for line in read_metrics(run_dir) if line["step"] > at]
    return max((line["time"] for line in lines), default=saved) - saved


def _packed(metrics: Owed) -> dict[str, list] | None:
    """Scalars as JSON, exact to the bit."""
    if metrics is None:
        return None
    arrays = {name: np.asarray(value) for name, value in metrics.items()}
    return {name: [str(array.dtype), array.item()] for name, array in arrays.items()}


def _unpacked(packed: Mapping[str, list] | None) -> dict[str, np.ndarray] | None:
    """The scalars that `_packed` was given."""
    if packed is None:
        return None
    return {
        name: np.asarray(value, jnp.dtype(dtype))
        for name, (dtype, value) in packed.items()
    }


def _check_identity(
    run_dir: str | os.PathLike[str],
    saved: Mapping[str, Any],
    ours: Mapping[str, Any],
    harmless: Collection[str],
) -> None:
    """Refuses to resume with other settings; if they are harmless, shows them."""
    ours = json.loads(json.dumps(ours))
    changed = {
        name: f"{name}: {saved.get(name)!r} before, {ours.get(name)!r} now"
        for name in {**ours, **saved}
        if saved.get(name) != ours.get(name)
    }
    shown = "\n  ".join(["", *changed.values()]) + "\n"
    if changed.keys() - set(harmless):
        wanted = f"the settings that the run in {run_dir} was started with"
        do = "Resume with those settings, or start a new run."
        raise Refusal(message("resume", wanted, f"other settings:{shown}", do))
    if changed:
        warnings.warn(f"resume: {run_dir} goes on with changes:{shown}", stacklevel=5)
