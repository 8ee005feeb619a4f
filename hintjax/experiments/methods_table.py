"""The methods that the command knows, by name: recipe, paper, and words about each."""

from typing import NamedTuple

from hintjax.experiments import recipes
from hintjax.experiments.recipes import Alone, BeforeTask, Beside, Recipe


class Named(NamedTuple):
    """A method of the command: how it trains, and its row in the table.

    Attributes:
        recipe: the published way to train with the method.
        title: the acronym of the method, and its variant.
        transfers: what the student learns from the teacher.
        reference: the paper.
        trains: what is trained beside the student.
    """

    recipe: Beside | BeforeTask | Alone
    title: str
    transfers: str
    reference: str
    trains: str = "nothing"


_PER_PAIR = "one regressor per pair"
_HEADS = "two heads"
_FITNETS = "Romero et al. 2015, FitNets: Hints for Thin Deep Nets"
_CRD = "Tian, Krishnan, Isola 2020, Contrastive Representation Distillation"

METHODS: dict[str, Named] = {
    "ab": Named(
        recipes.AB,
        "AB",
        "behind a regressor, the student's neurons are active where the teacher's "
        "neurons are active",
        "Heo et al. 2019, Knowledge Transfer via Distillation of Activation Boundaries "
        "Formed by Hidden Neurons",
        _PER_PAIR,
    ),
    "at": Named(
        recipes.AT,
        "AT",
        "the student's attention maps match the teacher's attention maps",
        "Zagoruyko and Komodakis 2017, Paying More Attention to Attention",
    ),
    "catkd": Named(
        recipes.CAT_KD,
        "CAT-KD",
        "the student finds evidence for each class at the teacher's positions",
        "Guo et al. 2023, Class Attention Transfer Based Knowledge Distillation",
    ),
    "cc": Named(
        recipes.CC,
        "CC, the benchmark's form",
        "the embeddings agree along the batch (`correlation_loss`)",
        "Peng et al. 2019, Correlation Congruence for Knowledge Distillation; Tian et "
        "al. 2020, CRD, code (CC.py, LinearEmbed)",
        "two heads per pair",
    ),
    "cosine": Named(
        recipes.COSINE,
        "DistilBERT",
        "hidden states have the direction of the teacher's hidden states",
        "Sanh et al. 2019, DistilBERT, a distilled version of BERT",
    ),
    "crd": Named(
        recipes.CRD,
        "CRD",
        "the two embeddings of an example are told from negatives, which are drawn "
        "for each example",
        _CRD,
        _HEADS,
    ),
    "crd_in_batch": Named(
        recipes.CRD_IN_BATCH,
        "CRD in the batch",
        "the two embeddings of an example are told from the other examples of the "
        "batch",
        _CRD,
        _HEADS,
    ),
    "crd_shared": Named(
        recipes.CRD_SHARED,
        "CRD, shared negatives",
        "the two embeddings of an example are told from negatives, which the batch "
        "shares",
        _CRD,
        _HEADS,
    ),
    "cwd": Named(
        recipes.CWD,
        "CWD",
        "each channel is active at the teacher's positions",
        "Shu et al. 2021, Channel-wise Knowledge Distillation for Dense Prediction",
        _PER_PAIR,
    ),
    "dense_matching": Named(
        recipes.DENSE,
        "Dense matching, lightly's second version",
        "a linear map of the student's last map predicts the teacher's features at "
        "every position; no labels",
        "Ranzinger et al. 2024, AM-RADIO: Agglomerative Vision Foundation Model Reduce "
        "All Domains Into One; lightly-train, code (distillationv2.py)",
        _PER_PAIR,
    ),
    "dist": Named(
        recipes.DIST,
        "DIST",
        "the student's output correlates with the teacher's output",
        "Huang et al. 2022, Knowledge Distillation from A Stronger Teacher",
    ),
    "dkd": Named(
        recipes.DKD,
        "DKD",
        "KD with one term for the label's class and one for the other classes",
        "Zhao et al. 2022, Decoupled Knowledge Distillation",
    ),
    "fitnet": Named(
        recipes.FITNETS_JOINTLY,
        "FitNets in one stage",
        "a regressor on the guided layer predicts the hint layer",
        _FITNETS,
        _PER_PAIR,
    ),
    "fitnets": Named(
        recipes.FITNETS,
        "FitNets",
        "a regressor on the guided layer predicts the hint layer",
        _FITNETS,
        _PER_PAIR,
    ),
    "fsp": Named(
        recipes.FSP,
        "FSP",
        "the flow between two layers (their FSP matrix) matches the teacher's flow",
        "Yim et al. 2017, A Gift from Knowledge Distillation",
        "one regressor per matched layer if widths differ",
    ),
    "ft": Named(
        recipes.FT,
        "FT",
        "a translator of the guided layer predicts the teacher's factor, which a "
        "paraphraser makes of the hint layer",
        "Kim, Park, Kwak 2018, Paraphrasing Complex Network: Network Compression via "
        "Factor Transfer",
        "one translator per pair (three 3x3 convolutions with BatchNorm)",
    ),
    "gram": Named(
        recipes.GRAM,
        "Gram matrices of tokens",
        "the student's tokens are alike where the teacher's tokens are",
        "Yang et al. 2020, TextBrewer: An Open-Source Knowledge Distillation Toolkit "
        "for Natural Language Processing",
    ),
    "hard": Named(
        recipes.HARD_LABELS,
        "Hard labels, as in DeiT",
        "the teacher's class is one more label",
        "Touvron et al. 2021, Training Data-Efficient Image Transformers and "
        "Distillation through Attention",
    ),
    "kd": Named(
        recipes.KD,
        "KD",
        "the student's softened output matches the teacher's softened output",
        "Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network",
    ),
    "mgd": Named(
        recipes.MGD,
        "MGD",
        "a generator predicts all of the teacher's features from a part of the "
        "student's features",
        "Yang et al. 2022, Masked Generative Distillation",
        "one generator per pair",
    ),
    "minilm": Named(
        recipes.MINILM,
        "MiniLM",
        "the relations between tokens match the teacher's relations",
        "Wang et al. 2020, MiniLM: Deep Self-Attention Distillation for Task-Agnostic "
        "Compression of Pre-Trained Transformers; Wang et al. 2021, MiniLMv2: "
        "Multi-Head Self-Attention Relation Distillation for Compressing Pretrained "
        "Transformers",
    ),
    "nst": Named(
        recipes.NST,
        "NST",
        "the student's channels select the positions that the teacher's channels "
        "select",
        "Huang and Wang 2017, Like What You Like: Knowledge Distill via Neuron "
        "Selectivity Transfer",
    ),
    "ofd": Named(
        recipes.OFD,
        "OFD",
        "the student's features before the ReLU match the teacher's margin ReLU",
        "Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation",
        _PER_PAIR,
    ),
    "orthogonal_projection": Named(
        recipes.VKD,
        "VkD",
        "the student's pooled features, rotated, predict the teacher's normalized "
        "pooled features; no labels",
        "Miles, Elezi, Deng 2024, VkD: Improving Knowledge Distillation using "
        "Orthogonal Projections",
        "one orthogonal matrix per pair",
    ),
    "phi_s": Named(
        recipes.PHI_S,
        "PHI-S",
        "dense matching of features that are standardized: all channels have variance "
        "1; no labels",
        "Ranzinger et al. 2024, PHI-S: Distribution Balancing for Label-Free "
        "Multi-Teacher Distillation",
        _PER_PAIR,
    ),
    "pkd": Named(
        recipes.PKD,
        "PKD",
        "the class token has the direction of the teacher's class token",
        "Sun et al. 2019, Patient Knowledge Distillation for BERT Model Compression",
    ),
    "pkt": Named(
        recipes.PKT,
        "PKT",
        "each example has the neighbors that it has for the teacher",
        "Passalis and Tefas 2018, Learning Deep Representations with Probabilistic "
        "Knowledge Transfer",
    ),
    "queue_similarity": Named(
        recipes.QUEUE,
        "SEED, lightly's first version",
        "each example is as near to earlier examples as it is for the teacher; no "
        "labels",
        "Fang et al. 2021, SEED: Self-supervised Distillation for Visual "
        "Representation; lightly-train, code (distillation.py)",
        "one head",
    ),
    "review": Named(
        recipes.REVIEW,
        "ReviewKD",
        "each stage of the student, fused with the deeper stages, predicts a hint",
        "Chen et al. 2021, Distilling Knowledge via Knowledge Review",
        "one ABF per pair",
    ),
    "rkd": Named(
        recipes.RKD,
        "RKD",
        "distances and angles between the examples of a batch match "
        "(`distance_loss`, `angle_loss`)",
        "Park et al. 2019, Relational Knowledge Distillation",
    ),
    "simkd": Named(
        recipes.SIMKD,
        "SimKD",
        "a projector predicts the teacher's last map, and the teacher's classifier "
        "follows it",
        "Chen et al. 2022, Knowledge Distillation with the Reused Teacher Classifier",
        "the projector",
    ),
    "soft": Named(
        recipes.SOFT,
        "KD as in FitNets' second stage",
        "cross-entropy of the softened outputs",
        f"{_FITNETS}, Eq. 2",
    ),
    "sp": Named(
        recipes.SP,
        "SP",
        "the examples that are alike for the teacher are alike for the student",
        "Tung and Mori 2019, Similarity-Preserving Knowledge Distillation",
    ),
    "std_kd": Named(
        recipes.STANDARDIZED_KD,
        "KD of standardized logits",
        "the student matches the relations between logits, not their size",
        "Sun et al. 2024, Logit Standardization in Knowledge Distillation",
    ),
    "tinybert": Named(
        recipes.TINYBERT,
        "TinyBERT",
        "hidden states match through a regressor, and attention scores match directly",
        "Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language "
        "Understanding",
        "the regressor",
    ),
    "vid": Named(
        recipes.VID,
        "VID",
        "the student predicts each hint's mean, and the variance of each channel",
        "Ahn et al. 2019, Variational Information Distillation for Knowledge Transfer",
        "a regressor `mean` and the numbers `scale` per pair",
    ),
}
# Methods that need class labels, or the softmax of a classifier. Other tasks have none.
CLASSES_ONLY = frozenset(
    (
        *("crd", "crd_in_batch", "crd_shared", "dist", "dkd", "hard"),
        *("simkd", "std_kd"),
    )
)
# The names of `--method` and `--compare`.
RECIPES: dict[str, Recipe] = {
    "backprop": recipes.backprop,
    **{name: named.recipe for name, named in METHODS.items()},
}
