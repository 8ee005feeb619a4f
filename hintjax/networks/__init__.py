"""Networks: any model as pure functions on plain pytrees, with named activations.

`linen`, `hintjax.networks.nnx.nnx` and `function` make a `Network` of a Flax Linen
module, a Flax NNX model or a function. `Wants` names the output, activations and
parameters that a method needs, and one forward pass returns them as `Features`.
`computed_in` sets the precision of a network, and `renormalized` converts its images.
"""

from hintjax.networks.function import function
from hintjax.networks.linen import linen
from hintjax.networks.network import Features, Network, Variables, Wants, join, split
from hintjax.networks.normalization import renormalized
from hintjax.networks.precision import computed_in
from hintjax.networks.quantized import calibrated, fake_quantized

__all__ = [
    "Features",
    "Network",
    "Variables",
    "Wants",
    "calibrated",
    "computed_in",
    "fake_quantized",
    "function",
    "join",
    "linen",
    "renormalized",
    "split",
]
