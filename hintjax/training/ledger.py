"""The ledger: where a run stands, and where its time went."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hintjax.stages import State
from hintjax.training.phase import Phase

_OVERHEAD = ("checkpoints", "data", "lost")  # seconds in which nothing is trained


class Fitted(NamedTuple):
    """The result of a run."""

    state: State
    steps: int
    seconds: float  # of training steps; the seconds in `spent` are not included
    boundaries: tuple[int, ...]  # the global step at which each phase ended
    spent: Mapping[str, float]  # seconds of other work and of steps that were lost

    @property
    def goodput(self) -> float:
        """The fraction of time in steps and evaluations, compilation left out.

        Lost steps are the steps after a checkpoint that a resumed run has made again,
        as far as a report told of them. The start of a process is not counted at all.
        """
        useful = self.seconds + self.spent.get("evaluation", 0.0)
        others = sum(self.spent.get(name, 0.0) for name in _OVERHEAD)
        return useful / max(useful + others, 1e-9)

    def account(self) -> str:
        """Says in one line where the time went."""
        shown = {"steps": self.seconds, **self.spent}
        parts = ", ".join(f"{name} {s:.1f} s" for name, s in sorted(shown.items()))
        return f"goodput {self.goodput:.1%}, less compilation ({parts})"


class Now(NamedTuple):
    """Where a run stands, besides the state of its stage.

    A checkpoint holds it as JSON, under the names of these fields.

    Attributes:
        at: steps of the run so far, over all phases.
        phase: the position of the current phase among the phases.
        began: the step at which the phase began.
        ended: the steps at which earlier phases ended.
        best: the lowest validation loss of the phase.
        waited: evaluations since that lowest loss.
        found: the validation loss at this very step, if it is known and finite.
        lowest: the lowest validation loss among the saved steps of the phase.
        seconds: seconds of training steps.
        dispatch: steps in one dispatch; None until they have been measured.
        spent: seconds of other work, by name.
    """

    at: int = 0
    phase: int = 0
    began: int = 0
    ended: Sequence[int] = ()
    best: float | None = None
    waited: int = 0
    found: float | None = None
    lowest: float | None = None
    seconds: float = 0.0
    dispatch: int | None = None
    spent: Mapping[str, float] = {}

    def end(self, phase: Phase) -> int:
        """The step at which the phase ends at the latest."""
        return self.began + phase.steps

    def over(self, phase: Phase) -> bool:
        """Whether the phase has made its steps or has lost its patience."""
        tired = phase.patience is not None and self.waited >= phase.patience
        return tired or self.at == self.end(phase)

    def moved(self, steps: int) -> "Now":
        """Goes some steps further, where no validation loss is known yet."""
        return self._replace(at=self.at + steps, found=None)

    def validated(self, loss: float) -> "Now":
        """Notes the validation loss at this step.

        A loss that is not finite counts as an evaluation without progress.
        """
        finite = math.isfinite(loss)
        better = finite and (self.best is None or loss < self.best)
        return self._replace(
            best=loss if better else self.best,
            waited=0 if better else self.waited + 1,
            found=loss if finite else None,
        )

    def is_lowest(self) -> bool:
        """Whether no saved step of the phase has a validation loss as low as this."""
        if self.found is None:
            return False
        return self.lowest is None or self.found < self.lowest

    def next_phase(self) -> "Now":
        """Ends the phase at this step and begins the next one."""
        return self._replace(
            ended=[*self.ended, self.at],
            phase=self.phase + 1,
            began=self.at,
            best=None,
            waited=0,
            lowest=None,
        )

    def spend(self, name: str, seconds: float) -> "Now":
        """Adds seconds of some work that is not a training step."""
        more = self.spent.get(name, 0.0) + seconds
        return self._replace(spent={**self.spent, name: more})
