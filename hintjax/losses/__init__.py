"""The published losses: each takes arrays and returns one value per example.

Every loss is `loss(student, teacher, *, hyper=default, where=None)`: pure, unweighted,
channels last. The section Convention of its docstring states the factor relative to
the paper and to the authors' code.
"""

from hintjax.losses.attention import (
    attention_energy,
    attention_map,
    attention_map_code,
    attention_map_loss,
    attention_map_loss_paper,
    attention_maps,
    attention_transfer_loss,
    attention_transfer_loss_paper,
)
from hintjax.losses.attention_scores import (
    attention_distribution_loss,
    attention_score_loss,
    attention_score_loss_code,
)
from hintjax.losses.bernoulli import binary_kd_loss
from hintjax.losses.boundary import activation_boundary_loss
from hintjax.losses.channel import channel_loss
from hintjax.losses.class_attention import class_activation_map, class_attention_loss
from hintjax.losses.correlation import correlation_loss
from hintjax.losses.cosine import cosine_loss
from hintjax.losses.crd import (
    contrastive_log_constant,
    contrastive_loss,
    contrastive_scores_loss,
)
from hintjax.losses.decoupled import decoupled_kd_loss
from hintjax.losses.dist import dist_loss
from hintjax.losses.embedding_queue import (
    position_similarity_loss,
    queue_similarity_loss,
)
from hintjax.losses.factor import factor_loss
from hintjax.losses.feature_standardization import (
    FeatureMoments,
    Standardization,
    channel_standardization,
    feature_moments,
    global_standardization,
    hadamard_whitening,
    layer_normalize,
    merge_moments,
    pca_whitening,
    phi_standardization,
    restore_features,
    standardize_features,
    zca_whitening,
)
from hintjax.losses.fsp import (
    fsp_loss,
    fsp_loss_paper,
    fsp_matrix,
    fsp_matrix_loss,
    fsp_matrix_loss_paper,
    fsp_matrix_paper,
)
from hintjax.losses.generation import masked_generation_loss
from hintjax.losses.hard_labels import hard_label_loss
from hintjax.losses.hint import hint_loss, hint_loss_paper
from hintjax.losses.kd import kd_loss, soft_cross_entropy_loss
from hintjax.losses.overhaul import batch_norm_margin, margin_relu, partial_l2_loss
from hintjax.losses.patient import patient_loss
from hintjax.losses.probability import probability_loss
from hintjax.losses.relational import angle_loss, distance_loss
from hintjax.losses.review import hierarchical_context_loss
from hintjax.losses.selectivity import selectivity_loss
from hintjax.losses.similarity import similarity_loss, similarity_matrix
from hintjax.losses.smooth_l1 import (
    cosine_smooth_l1_loss,
    cosine_smooth_l1_map_loss,
    smooth_l1_loss,
)
from hintjax.losses.standardize import standardize_logits
from hintjax.losses.token_relations import relation_loss, token_gram_loss
from hintjax.losses.variational import variational_loss

__all__ = (
    "FeatureMoments",
    "Standardization",
    "activation_boundary_loss",
    "angle_loss",
    "attention_distribution_loss",
    "attention_energy",
    "attention_map",
    "attention_map_code",
    "attention_map_loss",
    "attention_map_loss_paper",
    "attention_maps",
    "attention_score_loss",
    "attention_score_loss_code",
    "attention_transfer_loss",
    "attention_transfer_loss_paper",
    "batch_norm_margin",
    "binary_kd_loss",
    "channel_loss",
    "channel_standardization",
    "class_activation_map",
    "class_attention_loss",
    "contrastive_log_constant",
    "contrastive_loss",
    "contrastive_scores_loss",
    "correlation_loss",
    "cosine_loss",
    "cosine_smooth_l1_loss",
    "cosine_smooth_l1_map_loss",
    "decoupled_kd_loss",
    "dist_loss",
    "distance_loss",
    "factor_loss",
    "feature_moments",
    "fsp_loss",
    "fsp_loss_paper",
    "fsp_matrix",
    "fsp_matrix_loss",
    "fsp_matrix_loss_paper",
    "fsp_matrix_paper",
    "global_standardization",
    "hadamard_whitening",
    "hard_label_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "hint_loss_paper",
    "kd_loss",
    "layer_normalize",
    "margin_relu",
    "masked_generation_loss",
    "merge_moments",
    "partial_l2_loss",
    "patient_loss",
    "pca_whitening",
    "phi_standardization",
    "position_similarity_loss",
    "probability_loss",
    "queue_similarity_loss",
    "relation_loss",
    "restore_features",
    "selectivity_loss",
    "similarity_loss",
    "similarity_matrix",
    "smooth_l1_loss",
    "soft_cross_entropy_loss",
    "standardize_features",
    "standardize_logits",
    "token_gram_loss",
    "variational_loss",
    "zca_whitening",
)
