"""Any model as pure functions on plain pytrees, with named activations."""

from hintjax.networks.function import function
from hintjax.networks.linen import linen
from hintjax.networks.network import Features, Network, Variables, Wants, join, split
from hintjax.networks.precision import computed_in

__all__ = [
    "Features",
    "Network",
    "Variables",
    "Wants",
    "computed_in",
    "function",
    "join",
    "linen",
    "split",
]
