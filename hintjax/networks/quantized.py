"""A network that computes as its int8 file will: fake quantization.

Integer files (TFLite) store each kernel as integers of one scale per output channel,
and the input of each layer as integers of one scale and one zero point. Here kernels
and inputs take the values that these integers stand for, in floating point:

    kernel: scale round(w / scale),  scale = max |w| / 127 of the output channel
    input:  scale (clip(round(x / scale) + zero, 0, 255) - zero),
            scale = (high - low) / 255,  zero = round(-low / scale)

The range low <= 0 <= high of an input is a moving average over training steps. The
derivative of rounding is taken as 1 (straight through), and that of clipping is exact.

An exporter folds BatchNorm into the kernel before it, which multiplies each output
channel by a number. The rounded kernel is multiplied by the same number, since each
output channel has a scale of its own. So kernels are rounded as they are.

Qwix (0.1.8) has such training, too, for more operations. It replaces functions of
`jax.lax` and `jax.numpy` while a model runs, and switches `jax.jit` off in it for
TFLite; one interceptor of Flax is enough here, and needs no other package.

References:
    Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference. Krishnamoorthi 2018, Quantizing deep
    convolutional networks for efficient inference.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hintjax._checks import Refusal, instance, integer, message, scalar
from hintjax.networks.network import Network, Variables, Wants, read_variables

COLLECTION = "quantization"  # of the state, beside BatchNorm's statistics
_RANGE = "range"
_LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
_DO = "Pass hj.linen(module) of a module with nn.Conv or nn.Dense."


def fake_quantized(
    network: Network,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    decay: float = 0.9,
) -> Network:
    """The network, with the rounding of an integer file in its forward pass.

    Every `nn.Conv`, `nn.ConvTranspose`, `nn.Dense` and `nn.DenseGeneral` sees its
    kernel and its input fake-quantized. So a student can learn to be right after the
    rounding: pass `fake_quantized(student)` to a stage (quantization-aware training).

    Parameters keep their names, shapes and precision, and hints their paths. The
    parameters of a trained student are those of the plain network, which is exported.
    The state has one more collection, "quantization", with the range of each input. As
    BatchNorm's statistics, ranges move in training only. The first batch of training
    sets a range. Before that, an evaluation uses the range of its own batch. A layer
    that is called twice has one range.

    Other operations stay as they are: an addition of two branches, products of
    activations in attention, embeddings, and the output of the network. For layers one
    after another, the error of the logits is that of an int8 file, up to a part that is
    smaller. In residual networks the file also rounds both branches of each addition,
    which this network does not. An exporter measures the ranges anew.

    Args:
        network: the network, of Flax Linen modules. Give `nn.scan`
            `variable_axes={"quantization": 0}` besides its other axes.
        weight_bits: bits of a weight, 2 to 8.
        activation_bits: bits of an input, 2 to 8.
        decay: part of a range that stays in a training step, in [0, 1).

    Returns:
        The network. Variables of the plain network become its variables with
        `calibrated`.

    Raises:
        ValueError: if the number of bits or the decay is outside its limits; or, from
            `init`, if there is no such layer.

    >>> from hintjax.networks.linen import linen
    >>> net = fake_quantized(linen(nn.Dense(2)))
    >>> params, state = net.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, params), state["quantization"]["range"].tolist()
    ({'bias': (2,), 'kernel': (3, 2)}, [0.0, 0.0])
    """
    where = "fake_quantized"
    instance(where, Network, network=network)
    for name, bits in (
        ("weight_bits", weight_bits),
        ("activation_bits", activation_bits),
    ):
        integer(where, 2, **{name: bits})
        scalar(where, "to be <= 8", lambda n: n <= 8, **{name: bits})
    scalar(where, "to be in [0, 1)", lambda x: 0 <= x < 1, decay=decay)
    rounding = _rounding(weight_bits, activation_bits, decay)

    def init(key, inputs):
        with nn.intercept_methods(_declared):
            made = network.init(key, inputs)
        if COLLECTION not in made.state:
            wanted = "a network with layers of Flax Linen"
            raise Refusal(message(where, wanted, "none of them", _DO))
        return made

    def apply(params, state, inputs, *, wants, train, key=None):
        if not (isinstance(state, Mapping) and COLLECTION in state):
            wanted = f"a state with the collection {COLLECTION!r}"
            do = "Use hj.calibrated(network, variables, inputs) for trained variables."
            raise Refusal(message(where, wanted, "none", do))
        with nn.intercept_methods(rounding):
            return network.apply(
                params, state, inputs, wants=wants, train=train, key=key
            )

    return network._replace(init=init, apply=apply)


def calibrated(network: Network, variables: Variables, inputs: PyTree) -> Variables:
    """Variables of the fake-quantized network, from those of the plain network.

    The ranges are those of the given inputs, with `train=False`. So the result is the
    network that is quantized after training, or the start of training with rounding.

    Args:
        network: the plain network. Each of its layers is called once, outside a scan.
        variables: variables of the plain network.
        inputs: some training inputs, such as 256 images.

    Returns:
        The same parameters and state, with the collection "quantization".

    Raises:
        ValueError: if the network has no layer that is quantized, or calls one twice.
    """
    instance("calibrated", Network, network=network)
    params, state = read_variables("calibrated", "the network's", variables)
    made = jax.eval_shape(fake_quantized(network).init, jax.random.key(0), inputs)
    ranges = made.state[COLLECTION]
    paths = tuple(f"{path}:in" for path in _paths(ranges))
    wants = Wants(hints=paths)
    shown, _ = network.apply(params, state, inputs, wants=wants, train=False)
    found = [_range_of(shown.hints[path]) for path in paths]
    ranges = jax.tree.unflatten(jax.tree.structure(ranges), found)
    return Variables(params, {**state, COLLECTION: ranges})


def fake_quantized_kernel(
    kernel: Float[Array, "..."], channels: tuple[int, ...] = (-1,), bits: int = 8
) -> Float[Array, "..."]:
    """A kernel, rounded to integers with one scale for each output channel.

    Args:
        kernel: the kernel.
        channels: its axes of output channels.
        bits: bits of an integer, one of them for the sign.

    Returns:
        scale round(w / scale), with scale = max |w| / (2^(bits - 1) - 1). Its
        derivative by w is 1.
    """
    w = kernel.astype(jnp.float32)
    kept = {axis % w.ndim for axis in channels}
    axes = tuple(axis for axis in range(w.ndim) if axis not in kept)
    largest = jnp.abs(w).max(axes, keepdims=True)
    # A channel of zeros stays as it is.
    scale = jnp.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)
    scale = jax.lax.stop_gradient(scale)
    return (scale * _rounded(w / scale)).astype(kernel.dtype)


def fake_quantized_activation(
    x: Float[Array, "..."], limits: Float[Array, "2"], bits: int = 8
) -> Float[Array, "..."]:
    """Activations, rounded to integers with one scale and one zero point.

    Args:
        x: activations.
        limits: lowest and highest value, low <= 0 <= high.
        bits: bits of an integer.

    Returns:
        scale (clip(round(x / scale) + zero, 0, n) - zero), with n = 2^bits - 1, scale =
        (high - low) / n and zero = round(-low / scale), so that 0 stays 0. The
        derivative by x is 1 inside of the range, and 0 outside.
    """
    n = 2**bits - 1
    low, high = jax.lax.stop_gradient(limits.astype(jnp.float32))
    scale = jnp.where(high > low, high - low, 1.0) / n
    zero = jnp.round(-low / scale)
    steps = _rounded(x.astype(jnp.float32) / scale)
    inside = (steps >= -zero) & (steps <= n - zero)
    clipped = jnp.clip(jax.lax.stop_gradient(steps), -zero, n - zero)
    return (scale * jnp.where(inside, steps, clipped)).astype(x.dtype)


@jax.custom_jvp
def _rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest integers; the derivative is taken as 1."""
    return jnp.round(x)


@_rounded.defjvp
def _straight_through(primals: tuple, tangents: tuple) -> tuple:
    return _rounded(*primals), tangents[0]


def _range_of(x: Array) -> Float[Array, "2"]:
    """The lowest and the highest value, and 0 between them."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.stack([jnp.minimum(x.min(), 0.0), jnp.maximum(x.max(), 0.0)])


def _quantizes(context: nn.module.InterceptorContext) -> bool:
    """Whether a call is that of a layer with a kernel."""
    return isinstance(context.module, _LAYERS) and context.method_name == "__call__"


def _declared(call_next, args, kwargs, context):
    """An interceptor that declares the range of a layer's input: not known yet."""
    if _quantizes(context) and context.module.is_initializing():
        module = context.module
        if not module.is_mutable_collection(COLLECTION):
            wanted = f"the collection {COLLECTION!r} inside of a scan"
            do = f"Give nn.scan variable_axes={{{COLLECTION!r}: 0}}."
            raise Refusal(message("fake_quantized", wanted, "none", do))
        module.put_variable(COLLECTION, _RANGE, jnp.zeros(2))
    return call_next(*args, **kwargs)


def _rounding(weight_bits: int, activation_bits: int, decay: float) -> Any:
    """An interceptor that rounds the input and the kernel of each layer."""

    def intercept(call_next, args, kwargs, context):
        if not _quantizes(context):
            return call_next(*args, **kwargs)
        module = context.module
        inputs, *others = args or (kwargs.pop("inputs"),)
        inputs = jnp.asarray(inputs)
        limits = _limits(module, inputs, decay)
        inputs = fake_quantized_activation(inputs, limits, activation_bits)
        channels = _channels(module)

        def param(name: str, *args: Any, **kwargs: Any) -> Any:
            value = type(module).param(module, name, *args, **kwargs)
            if name != "kernel":
                return value
            return fake_quantized_kernel(value, channels, weight_bits)

        # The layer asks for its kernel with `self.param`, and no Flax interceptor sees
        # that call.
        object.__setattr__(module, "param", param)
        try:
            return call_next(inputs, *others, **kwargs)
        finally:
            object.__delattr__(module, "param")

    return intercept


def _limits(module: nn.Module, inputs: Array, decay: float) -> Float[Array, "2"]:
    """The range of a layer's input, which moves in training."""
    limits, own = module.get_variable(COLLECTION, _RANGE), _range_of(inputs)
    known = limits[0] < limits[1]
    if not module.is_mutable_collection(COLLECTION):
        return jnp.where(known, limits, own)
    limits = jnp.where(known, decay * limits + (1 - decay) * own, own)
    module.put_variable(COLLECTION, _RANGE, limits)
    return limits


def _channels(module: nn.Module) -> tuple[int, ...]:
    """The axes of a layer's kernel that are its output channels."""
    if isinstance(module, nn.DenseGeneral) and not isinstance(module.features, int):
        return tuple(range(-len(module.features), 0))
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return (-2,)
    return (-1,)


def _paths(ranges: Mapping[str, Any]) -> Iterator[str]:
    """The paths of all layers with a range, in the order of the tree's leaves."""
    for keys, _ in jax.tree_util.tree_leaves_with_path(ranges):
        yield "/".join(key.key for key in keys[:-1])
