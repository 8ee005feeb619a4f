"""Hint learning in JAX and Flax.

A student network is trained to reproduce what a teacher computes in its hidden
layers. `losses` are pure functions of arrays; a `Method` says what it wants to see
of each `Network` and what it trains; a stage makes an optax update step of it.
"""

from hintjax import losses, regressors
from hintjax.method import (
    Context,
    Data,
    Method,
    Weighted,
    objective,
    over_pairs,
    task,
    weighted,
)
from hintjax.methods import (
    attention_transfer,
    explained_variance,
    fitnets,
    kd,
    lambda_decay,
    review,
    soft_targets,
    warm_up,
)
from hintjax.networks import (
    Features,
    Network,
    Variables,
    Wants,
    join,
    linen,
    split,
)
from hintjax.pairing import suggest_pairs
from hintjax.sharding import data_mesh
from hintjax.stages import (
    Stage,
    State,
    distillation_stage,
    hint_stage,
    student_variables,
)

__all__ = [
    "Context",
    "Data",
    "Features",
    "Method",
    "Network",
    "Stage",
    "State",
    "Variables",
    "Wants",
    "Weighted",
    "attention_transfer",
    "data_mesh",
    "distillation_stage",
    "explained_variance",
    "fitnets",
    "hint_stage",
    "join",
    "kd",
    "lambda_decay",
    "linen",
    "losses",
    "objective",
    "over_pairs",
    "regressors",
    "review",
    "soft_targets",
    "split",
    "student_variables",
    "suggest_pairs",
    "task",
    "warm_up",
    "weighted",
]
