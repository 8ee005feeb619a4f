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
from hintjax.losses.crd import (
    contrastive_log_constant,
    contrastive_loss,
    contrastive_scores_loss,
)
from hintjax.losses.fsp import (
    fsp_loss,
    fsp_loss_paper,
    fsp_matrix,
    fsp_matrix_loss,
    fsp_matrix_loss_paper,
    fsp_matrix_paper,
)
from hintjax.losses.hint import hint_loss, hint_loss_paper
from hintjax.losses.kd import kd_loss, soft_cross_entropy_loss
from hintjax.losses.probability import probability_loss
from hintjax.losses.relational import angle_loss, distance_loss
from hintjax.losses.review import hierarchical_context_loss
from hintjax.losses.similarity import similarity_loss, similarity_matrix

__all__ = (
    "angle_loss",
    "attention_map",
    "attention_map_loss",
    "attention_map_loss_paper",
    "attention_maps",
    "attention_transfer_loss",
    "attention_transfer_loss_paper",
    "contrastive_log_constant",
    "contrastive_loss",
    "contrastive_scores_loss",
    "distance_loss",
    "fsp_loss",
    "fsp_loss_paper",
    "fsp_matrix",
    "fsp_matrix_loss",
    "fsp_matrix_loss_paper",
    "fsp_matrix_paper",
    "hierarchical_context_loss",
    "hint_loss",
    "hint_loss_paper",
    "kd_loss",
    "probability_loss",
    "similarity_loss",
    "similarity_matrix",
    "soft_cross_entropy_loss",
)
