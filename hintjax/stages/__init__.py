"""The two stages of hint learning, as optax update steps.

The *hint stage* (`hint`) trains the layers below the guided layers, and the regressors.
The *distillation stage* (`distillation`) trains the whole student. Both are the same
step (`update`):

    taught = teach(state, teacher, batch)          the teacher's features
    state, metrics = step(state, taught, batch)    one update of the student

`forward` computes the loss; `placement` knows meshes, `accumulation` micro-batches,
`skipping` bad steps, `start` the first state.
"""

from hintjax.stages.debugging import checked
from hintjax.stages.distillation import distillation_stage
from hintjax.stages.hint import hint_stage
from hintjax.stages.report import Report, silent_terms
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
    "silent_terms",
    "student_variables",
]
