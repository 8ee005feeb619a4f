"""The published methods, one file each: wants, trained parts, loss."""

from hintjax.methods.attention_transfer import attention_transfer
from hintjax.methods.crd import (
    AnchorNegatives,
    BatchNegatives,
    GivenNegatives,
    SharedNegatives,
    crd,
    crd_bytes,
)
from hintjax.methods.fitnets import explained_variance, fitnets, lambda_decay
from hintjax.methods.fsp import flows, fsp
from hintjax.methods.kd import kd, soft_targets
from hintjax.methods.probability import probability_transfer
from hintjax.methods.relational import relational
from hintjax.methods.review import review, warm_up
from hintjax.methods.similarity import similarity_preserving

__all__ = [
    "AnchorNegatives",
    "BatchNegatives",
    "GivenNegatives",
    "SharedNegatives",
    "attention_transfer",
    "crd",
    "crd_bytes",
    "explained_variance",
    "fitnets",
    "flows",
    "fsp",
    "kd",
    "lambda_decay",
    "probability_transfer",
    "relational",
    "review",
    "similarity_preserving",
    "soft_targets",
    "warm_up",
]
