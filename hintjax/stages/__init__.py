"""The two stages of hint learning, as optax update steps."""

from hintjax.stages.debugging import checked
from hintjax.stages.distillation import distillation_stage
from hintjax.stages.hint import hint_stage
from hintjax.stages.report import Report
from hintjax.stages.skipping import Norms, SpikeGuard
from hintjax.stages.stage import (
    Batch,
    Metrics,
    Skipped,
    Stage,
    State,
    image,
    student_variables,
)

__all__ = [
    "Batch",
    "Metrics",
    "Norms",
    "Report",
    "Skipped",
    "SpikeGuard",
    "Stage",
    "State",
    "checked",
    "distillation_stage",
    "hint_stage",
    "image",
    "student_variables",
]
