"""The published methods, one file each: features, trained parameters, loss."""

from hintjax.methods._negatives import (
    AnchorNegatives,
    BatchNegatives,
    GivenNegatives,
    SharedNegatives,
)
from hintjax.methods.attention_transfer import attention_transfer
from hintjax.methods.boundary import activation_boundary
from hintjax.methods.channel import channel_wise
from hintjax.methods.class_attention import class_attention
from hintjax.methods.correlation import correlation_congruence
from hintjax.methods.cosine import cosine
from hintjax.methods.crd import crd, crd_bytes
from hintjax.methods.decoupled_kd import decoupled_kd
from hintjax.methods.dense_matching import dense_matching
from hintjax.methods.dist import dist
from hintjax.methods.factor import factor_transfer, paraphrase
from hintjax.methods.fitnets import explained_variance, fitnets, lambda_decay
from hintjax.methods.fsp import flows, fsp
from hintjax.methods.generation import (
    masked_channels,
    masked_generation,
    masked_positions,
)
from hintjax.methods.hard_labels import hard_labels
from hintjax.methods.kd import kd, soft_targets, standardized_kd
from hintjax.methods.minilm import minilm
from hintjax.methods.orthogonal_projection import orthogonal_projection
from hintjax.methods.overhaul import overhaul
from hintjax.methods.patient import patient
from hintjax.methods.probability import probability_transfer
from hintjax.methods.queue_similarity import queue_similarity
from hintjax.methods.relational import relational
from hintjax.methods.review import review, warm_up
from hintjax.methods.selectivity import selectivity
from hintjax.methods.similarity import similarity_preserving
from hintjax.methods.simkd import reused_classifier, simkd
from hintjax.methods.task_kd import binary_kd, dense_kd, regression_kd
from hintjax.methods.tinybert import tinybert
from hintjax.methods.token_gram import token_gram
from hintjax.methods.variational import variational

__all__ = [
    "AnchorNegatives",
    "BatchNegatives",
    "GivenNegatives",
    "SharedNegatives",
    "activation_boundary",
    "attention_transfer",
    "binary_kd",
    "channel_wise",
    "class_attention",
    "correlation_congruence",
    "cosine",
    "crd",
    "crd_bytes",
    "decoupled_kd",
    "dense_kd",
    "dense_matching",
    "dist",
    "explained_variance",
    "factor_transfer",
    "fitnets",
    "flows",
    "fsp",
    "hard_labels",
    "kd",
    "lambda_decay",
    "masked_channels",
    "masked_generation",
    "masked_positions",
    "minilm",
    "orthogonal_projection",
    "overhaul",
    "paraphrase",
    "patient",
    "probability_transfer",
    "queue_similarity",
    "regression_kd",
    "relational",
    "reused_classifier",
    "review",
    "selectivity",
    "similarity_preserving",
    "simkd",
    "soft_targets",
    "standardized_kd",
    "tinybert",
    "token_gram",
    "variational",
    "warm_up",
]
