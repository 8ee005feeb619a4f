"""Networks from the names of their factories, and checks of what a factory makes."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, form, message, nearest
from hintjax.experiments.config import Config
from hintjax.networks import Network, Wants, fake_quantized, linen
from hintjax.networks.nnx import nnx


def factory(name: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names.

    Raises:
        Refusal: if there is no such factory.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        do = "An example is hintjax.models:resnet20."
        raise Refusal(message("model", "package.module:factory", repr(name), do))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Refusal(
            message("model", f"to import {module_name}", f"{error}")
        ) from None
    if not hasattr(module, attribute):
        near = ", ".join(nearest(attribute, dir(module)))
        do = f"Nearest: {near}."
        wanted = f"a factory in {module_name}"
        raise Refusal(message("model", wanted, attribute, do))
    made = getattr(module, attribute)
    wanted = f"{name} to be a factory, called as {attribute}(classes=...)"
    if not callable(made):
        raise Refusal(message("model", wanted, type(made).__name__))
    parameters = _parameters(made)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in ("self", "classes", "rngs")
    ]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if missing or not ("classes" in parameters or any_name):
        takes = ", ".join(missing or parameters) or "nothing"
        got = f"a factory that takes {takes}"
        raise Refusal(message("model", wanted, got))
    return made


def network(name: str, classes: int) -> Network:
    """The network that a factory makes.

    Args:
        name: name of the factory. It is called as factory(classes=...), and makes a
            Flax Linen module or a `Network`. A factory that takes `rngs` is called as
            factory(classes=..., rngs=...), and makes a Flax NNX model.
        classes: number of classes of the dataset.

    Returns:
        The network.

    Raises:
        Refusal: if there is no such factory, or it makes something else.
    """
    made = factory(name)
    if _takes_rngs(made):
        return nnx(functools.partial(made, classes=classes))
    made = made(classes=classes)
    if isinstance(made, Network):
        return made
    if isinstance(made, nn.Module):
        return linen(made)
    wanted = f"{name} to make a Flax Linen module or a hintjax.Network"
    do = "A factory of NNX models takes rngs."
    raise Refusal(message("model", wanted, type(made).__name__, do))


def student_network(config: Config, classes: int, name: str | None = None) -> Network:
    """The network of a config's student; it rounds if the config says so.

    Args:
        config: config of the run.
        classes: number of classes of the dataset.
        name: factory of the student, if it is not the config's.
    """
    made = network(name or config.student, classes)
    return fake_quantized(made) if config.quantize else made


def attribute_of(name: str, classes: int, attribute: str, missing: Any) -> Any:
    """An attribute of a factory's module, such as its preactivations."""
    made = factory(name)
    if _takes_rngs(made):
        return missing
    return getattr(made(classes=classes), attribute, missing)


def _takes_rngs(made: Any) -> bool:
    """Whether a factory makes a Flax NNX model."""
    return "rngs" in _parameters(made)


def _parameters(made: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a factory; none if it has no signature."""
    # The class of an NNX model hides the parameters of its __init__.
    called = made.__init__ if isinstance(made, type) else made
    try:
        return inspect.signature(called).parameters
    except (TypeError, ValueError):
        return {}


def check_output(name: str, network: Network, inputs: jax.Array) -> None:
    """Raises unless a network gives one array of logits, found on shapes alone.

    Args:
        name: name of the factory of the network.
        network: the network.
        inputs: some images.

    Raises:
        WrongType: if the output is a tuple, a dict or another container.
        Refusal: if the output has no axis of classes, as `(batch,)`.
    """
    found = _output(network, inputs)
    wanted = f"{name} to make a model that gives logits, (batch, classes)"
    if not isinstance(found, jax.ShapeDtypeStruct):
        do = (
            "Let the factory return hintjax.linen(module, call=...), with a call that "
            "returns the logits alone, e.g. lambda module, x, train: module(x)[0]."
        )
        raise WrongType(message("model", wanted, form(found), do))
    if found.ndim < 2 or found.shape[0] != inputs.shape[0]:
        do = "Give one logit for each class; a model of two classes gives two logits."
        raise Refusal(message("model", wanted, f"the shape {found.shape}", do))


def check_learns(name: str, classes: int, weights: str | None) -> None:
    """Raises if a network without logits has no weights: labels cannot train it.

    Args:
        name: name of the factory of the network.
        classes: number of classes of the dataset.
        weights: file of the weights of the network; None if it is trained.

    Raises:
        Refusal: if the module says that it has no logits, by `has_logits`.
    """
    if weights is None and not attribute_of(name, classes, "has_logits", True):
        do = "As a teacher, give it weights: --weights FILE.safetensors."
        wanted = f"{name} to make a model with logits, which labels can train"
        raise Refusal(message("model", wanted, "features alone", do))


def layers(network: Network, inputs: jax.Array) -> dict[str, jax.ShapeDtypeStruct]:
    """The layers of a network for such inputs, found on shapes alone."""
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    return network.layers(*variables, inputs)


def output_shape(network: Network, inputs: jax.Array) -> Any:
    """The shape of one example's output; a tree of shapes if the output is a tree."""
    return jax.tree.map(lambda array: array.shape[1:], _output(network, inputs))


def _output(network: Network, inputs: jax.Array) -> PyTree:
    """The output of a network, found on shapes alone."""

    def output(inputs: jax.Array) -> PyTree:
        variables = network.init(jax.random.key(0), inputs)
        wants = Wants(output=True)
        return network.apply(*variables, inputs, wants=wants, train=False)[0].output

    return jax.eval_shape(output, inputs)
