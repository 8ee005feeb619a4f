"""Hint learning in JAX and Flax.

A student network is trained to reproduce what a teacher computes in its hidden
layers. `losses` are pure functions of arrays; a `Method` says what it wants to see
of each `Network` and what it trains; a stage makes an optax update step of it.
"""

from typing import TYPE_CHECKING

from hintjax import losses, metrics, regressors
from hintjax._checks import Refusal
from hintjax.method import Context, Data, Method, over_pairs
from hintjax.methods import (
    AnchorNegatives,
    BatchNegatives,
    GivenNegatives,
    SharedNegatives,
    activation_boundary,
    attention_transfer,
    binary_kd,
    channel_wise,
    class_attention,
    correlation_congruence,
    cosine,
    crd,
    crd_bytes,
    decoupled_kd,
    dense_kd,
    dense_matching,
    dist,
    explained_variance,
    factor_transfer,
    fitnets,
    flows,
    fsp,
    hard_labels,
    kd,
    lambda_decay,
    masked_channels,
    masked_generation,
    masked_positions,
    minilm,
    orthogonal_projection,
    overhaul,
    paraphrase,
    patient,
    probability_transfer,
    queue_similarity,
    regression_kd,
    relational,
    reused_classifier,
    review,
    selectivity,
    similarity_preserving,
    simkd,
    soft_targets,
    standardized_kd,
    tinybert,
    token_gram,
    variational,
    warm_up,
)
from hintjax.methods.task import task
from hintjax.methods.uncertainty import uncertain
from hintjax.networks import (
    Features,
    Network,
    Variables,
    Wants,
    calibrated,
    computed_in,
    fake_quantized,
    function,
    join,
    linen,
    split,
)
from hintjax.objective import (
    Adjustable,
    Weighted,
    objective,
    teacher_dropping,
    weighted,
)
from hintjax.pairing import suggest_pairs
from hintjax.population import Population, population, reweighted
from hintjax.sharding import Layout, data_mesh, make_mesh
from hintjax.stages import (
    SpikeGuard,
    Stage,
    State,
    checked,
    distillation_stage,
    hint_stage,
    silent_terms,
    student_variables,
)
from hintjax.stages.balance import Balance, rebalanced
from hintjax.stages.oriented import distillation_oriented
from hintjax.teachers import (
    from_teacher,
    moving_average,
    seeing,
    self_taught,
    together,
)
from hintjax.views import at_head, viewed

__all__ = [
    "Adjustable",
    "AnchorNegatives",
    "Balance",
    "BatchNegatives",
    "Context",
    "Data",
    "Features",
    "GivenNegatives",
    "Layout",
    "Method",
    "Network",
    "Population",
    "Refusal",
    "SharedNegatives",
    "SpikeGuard",
    "Stage",
    "State",
    "Variables",
    "Wants",
    "Weighted",
    "activation_boundary",
    "at_head",
    "attention_transfer",
    "binary_kd",
    "calibrated",
    "channel_wise",
    "checked",
    "class_attention",
    "computed_in",
    "correlation_congruence",
    "cosine",
    "crd",
    "crd_bytes",
    "data_mesh",
    "decoupled_kd",
    "dense_kd",
    "dense_matching",
    "dist",
    "distillation_oriented",
    "distillation_stage",
    "explained_variance",
    "factor_transfer",
    "fake_quantized",
    "fitnets",
    "flows",
    "from_teacher",
    "fsp",
    "function",
    "hard_labels",
    "hint_stage",
    "join",
    "kd",
    "lambda_decay",
    "linen",
    "losses",
    "make_mesh",
    "masked_channels",
    "masked_generation",
    "masked_positions",
    "metrics",
    "minilm",
    "moving_average",
    "nnx",
    "nnx_update",
    "objective",
    "orthogonal_projection",
    "over_pairs",
    "overhaul",
    "paraphrase",
    "patient",
    "population",
    "probability_transfer",
    "queue_similarity",
    "rebalanced",
    "regression_kd",
    "regressors",
    "relational",
    "reused_classifier",
    "review",
    "reweighted",
    "seeing",
    "selectivity",
    "self_taught",
    "silent_terms",
    "similarity_preserving",
    "simkd",
    "soft_targets",
    "split",
    "standardized_kd",
    "student_variables",
    "suggest_pairs",
    "task",
    "teacher_dropping",
    "tinybert",
    "together",
    "token_gram",
    "uncertain",
    "variational",
    "viewed",
    "warm_up",
    "weighted",
]

if TYPE_CHECKING:
    from hintjax.networks.nnx import nnx, nnx_update


def __getattr__(name: str) -> object:
    """`nnx` and `nnx_update` are imported when used: `flax.nnx` is heavy."""
    if name not in ("nnx", "nnx_update"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hintjax.networks import nnx as networks_nnx

    return getattr(networks_nnx, name)
