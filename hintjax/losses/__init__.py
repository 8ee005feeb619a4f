"""The published losses: arrays in, one value per example out.

Every loss is `loss(student, teacher, *, hyper=default, where=None)`: pure, unweighted,
channels last. Its docstring states the factor against the paper and the authors' code.
"""

from hintjax.losses.attention import (
    attention_map,
    attention_map_loss,
    attention_map_loss_paper,
    attention_maps,
    attention_transfer_loss,
    attention_transfer_loss_paper,
)
from hintjax.losses.hint import hint_loss, hint_loss_paper
from hintjax.losses.kd import kd_loss, soft_cross_entropy_loss
from hintjax.losses.review import hierarchical_context_loss

__all__ = (
    "attention_map",
    "attention_map_loss",
    "attention_map_loss_paper",
    "attention_maps",
    "attention_transfer_loss",
    "attention_transfer_loss_paper",
    "hierarchical_context_loss",
    "hint_loss",
    "hint_loss_paper",
    "kd_loss",
    "soft_cross_entropy_loss",
)
