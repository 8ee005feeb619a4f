"""The published methods, one file each: wants, trained parts, loss."""

from hintjax.methods.attention_transfer import attention_transfer
from hintjax.methods.fitnets import explained_variance, fitnets, lambda_decay
from hintjax.methods.kd import kd, soft_targets
from hintjax.methods.review import review, warm_up

__all__ = [
    "attention_transfer",
    "explained_variance",
    "fitnets",
    "kd",
    "lambda_decay",
    "review",
    "soft_targets",
    "warm_up",
]
