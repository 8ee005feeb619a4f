"""Which layers to match: pairs by depth or by measurement, and how well they agree."""

from hintjax.pairing.choice import (
    Candidate,
    Choice,
    Measured,
    choose,
    doubts_of_depth,
    doubts_of_explained,
    remarks,
    suggest_pairs,
)
from hintjax.pairing.explained import linearly_explained
from hintjax.pairing.layers import (
    candidates,
    depth_of,
    first_pair,
    head,
    nearest_in_depth,
    stage_pairs,
)
from hintjax.pairing.measuring import Seen, alignment, measure

__all__ = [
    "Candidate",
    "Choice",
    "Measured",
    "Seen",
    "alignment",
    "candidates",
    "choose",
    "depth_of",
    "doubts_of_depth",
    "doubts_of_explained",
    "first_pair",
    "head",
    "linearly_explained",
    "measure",
    "nearest_in_depth",
    "remarks",
    "stage_pairs",
    "suggest_pairs",
]
