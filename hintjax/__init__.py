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
    AnchorNegatives,
    BatchNegatives,
    GivenNegatives,
    SharedNegatives,
    attention_transfer,
    crd,
    crd_bytes,
    explained_variance,
    fitnets,
    flows,
    fsp,
    kd,
    lambda_decay,
    probability_transfer,
    relational,
    review,
    similarity_preserving,
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
    "AnchorNegatives",
    "BatchNegatives",
    "Context",
    "Data",
    "Features",
    "GivenNegatives",
    "Method",
    "Network",
    "SharedNegatives",
    "Stage",
    "State",
    "Variables",
    "Wants",
    "Weighted",
    "attention_transfer",
    "crd",
    "crd_bytes",
    "data_mesh",
    "distillation_stage",
    "explained_variance",
    "fitnets",
    "flows",
    "fsp",
    "hint_stage",
    "join",
    "kd",
    "lambda_decay",
    "linen",
    "losses",
    "objective",
    "over_pairs",
    "probability_transfer",
    "regressors",
    "relational",
    "review",
    "similarity_preserving",
    "soft_targets",
    "split",
    "student_variables",
    "suggest_pairs",
    "task",
    "warm_up",
    "weighted",
]
