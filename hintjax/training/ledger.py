"""Where a run stands, and where its time went."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.stages import State

_OVERHEAD = ("checkpoints", "data", "lost")  # seconds that train nobody


class Fitted(NamedTuple):
    """What a run came to."""

    state: State
    steps: int
    seconds: float  # of steps: what is in `spent` is not in it
    boundaries: tuple[int, ...]  # the global step at which each phase ended
    spent: Mapping[str, float]  # seconds that went elsewhere, and into lost steps

    @property
    def goodput(self) -> float:
        """The share of steps and evaluations in all seconds but those of compilation.

        Lost are the steps after a checkpoint that a resumed run has made again, as far
        as a report told of them; the start of a process is in none of the seconds.
        """
        useful = self.seconds + self.spent.get("evaluation", 0.0)
        others = sum(self.spent.get(name, 0.0) for name in _OVERHEAD)
        return useful / max(useful + others, 1e-9)

    def account(self) -> str:
        """Where the time went, in one line."""
        shown = {"steps": self.seconds, **self.spent}
        parts = ", ".join(f"{name} {s:.1f} s" for name, s in sorted(shown.items()))
        return f"goodput {self.goodput:.1%}, less compilation ({parts})"


class Now(NamedTuple):
    """Where a run stands, beside the state of its stage; JSON."""

    at: int = 0  # steps of the run, over all phases
    phase: int = 0
    began: int = 0  # the step at which the phase began
    ended: Sequence[int] = ()  # the steps at which phases ended
    best: float | None = None  # the phase's lowest validation loss,
    waited: int = 0  # and the evaluations since
    found: float | None = None  # the validation loss at this very step
    lowest: float | None = None  # of the phase's steps that were saved
    seconds: float = 0.0
    dispatch: int | None = None
    spent: Mapping[str, float] = {}  # seconds, besides those of steps

    def spend(self, name: str, seconds: float) -> "Now":
        more = self.spent.get(name, 0.0) + seconds
        return self._replace(spent={**self.spent, name: more})


def packed(metrics):
    """Scalars as JSON, to the bit."""
    if metrics is None:
        return None
    arrays = {name: np.asarray(value) for name, value in metrics.items()}
    return {name: [str(array.dtype), array.item()] for name, array in arrays.items()}


def unpacked(packed):
    if packed is None:
        return None
    return {
        name: np.asarray(value, jnp.dtype(dtype))
        for name, (dtype, value) in packed.items()
    }


def check_identity(run_dir, saved, ours, harmless):
    """Shows all that has changed since a run was started, or refuses it."""
    ours = json.loads(json.dumps(ours))
    changed = {
        name: f"{name}: {saved.get(name)!r} before, {ours.get(name)!r} now"
        for name in {**ours, **saved}
        if saved.get(name) != ours.get(name)
    }
    shown = "\n  ".join(["", *changed.values()]) + "\n"
    if changed.keys() - set(harmless):
        wanted = f"{run_dir} to go on as what it was started as"
        do = "Resume with what it was started with, or start anew."
        raise Refusal(message("resume", wanted, f"other settings:{shown}", do))
    if changed:
        warnings.warn(f"resume: {run_dir} goes on with changes:{shown}", stacklevel=5)
