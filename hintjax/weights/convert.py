"""Tensors of a torch model as the variables of a Flax model, by a map of names."""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.networks import Variables, join


class How(NamedTuple):
    """How one leaf of a Flax model is made of torch's tensors.

    Attributes:
        axes: of the leaf, by name, e.g. "height width in out".
        shapes: of the tensors, from the sizes of the leaf's axes.
        convert: `(shape of the leaf, *tensors) -> leaf`.
    """

    axes: str
    shapes: Callable[..., list[tuple[int, ...]]]
    convert: Callable[..., np.ndarray]


class Rule(NamedTuple):
    """Which tensors make which leaf.

    Attributes:
        flax: path of the leaf, from the collection on; `<b>` stands for any number.
        torch: names of the tensors; `<b>` is that number, `<b-1>` the one before.
        how: how the leaf is made of them.
    """

    flax: str
    torch: tuple[str, ...]
    how: How


class Names(NamedTuple):
    """What the parts of a family are called, in torch and in Flax.

    Attributes:
        rules: the first one that fits a leaf counts.
        unused: names of tensors that the Flax model has no use for; `*` is any text.
    """

    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()

    def find(self, path: str) -> Rule | None:
        """The rule of one leaf, its numbers put in; None for a leaf without a name.

        >>> kernel = How("in out", lambda i, o: [(o, i)], lambda shape, x: x.T)
        >>> rule = Rule("params/block<b>/kernel", ("blocks.<b-1>.weight",), kernel)
        >>> Names((rule,)).find("params/block1/kernel").torch
        ('blocks.0.weight',)
        """
        for rule in self.rules:
            pattern = re.sub(r"<(\w)>", r"(?P<\1>\\d+)", re.escape(rule.flax))
            match = re.fullmatch(pattern, path)
            if match:
                torch = tuple(_numbered(name, match) for name in rule.torch)
                return Rule(path, torch, rule.how)
        return None


def from_torch(
    tensors: Mapping[str, np.ndarray], names: Names, like: Variables
) -> Variables:
    """Variables of a Flax model from torch's tensors; nothing may be left over.

    Args:
        tensors: by torch's names, e.g. what `read_safetensors` returns.
        names: what they are called in the model, e.g. `RESNET`.
        like: variables of the model, or their shapes: `jax.eval_shape(network.init,
            key, images)`.

    Returns:
        Variables with the structure, shapes and dtypes of `like`.

    Raises:
        ValueError: if tensors are missing, left over, misshapen or no floats, or
            leaves of the model unnamed; all of them are listed.

    >>> from flax import linen as nn
    >>> import hintjax as hj
    >>> from hintjax import weights
    >>> network = hj.linen(nn.Sequential([nn.Dense(2)]))
    >>> like = network.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> tensors = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
    >>> names = weights.Names(weights.linear("layers_0", "fc"))
    >>> variables = weights.from_torch(tensors, names, like)
    >>> variables.params["layers_0"]["kernel"].shape
    (3, 2)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(join(like))
    kinds = ("missing", "left over", "misshapen", "no floats", "unnamed")
    problems = {kind: {} for kind in kinds}
    values, used = [], set()
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        rule = names.find(path)
        if rule is None:
            problems["unnamed"][path] = None
            continue
        used.update(rule.torch)
        faults = list(_faults(rule, tensors, leaf.shape))
        for kind, text in faults:
            problems[kind][text] = None
        if not faults:
            parts = [tensors[name] for name in rule.torch]
            made = rule.how.convert(leaf.shape, *parts)
            # Else jax may go on using numpy's memory: the whole file stays there.
            values.append(jnp.array(made, leaf.dtype, copy=True))
    for name in sorted(set(tensors) - used):
        if not any(fnmatchcase(name, unused) for unused in names.unused):
            problems["left over"][name] = None
    got = [f"{kind}: {', '.join(texts)}" for kind, texts in problems.items() if texts]
    if got:
        wanted = "tensors and model to match one to one"
        do = "Build the model that the file was saved from, or take its names."
        raise Refusal(message("from_torch", wanted, "; ".join(got), do))
    collections = jax.tree.unflatten(structure, values)
    return Variables(collections.pop("params"), collections)


def _numbered(name, match):
    return re.sub(r"<(\w)(-1)?>", lambda m: str(int(match[m[1]]) - bool(m[2])), name)


def _faults(rule, tensors, shape):
    """What keeps tensors from being a leaf: (kind of problem, in words)."""
    axes = rule.how.axes.split()
    if len(shape) != len(axes):
        yield "misshapen", f"{rule.flax} {shape} for ({', '.join(axes)})"
        return
    wanted = rule.how.shapes(*shape)
    if len(wanted) != len(rule.torch):
        yield "misshapen", f"{rule.flax} {shape} for {', '.join(rule.torch)}"
        return
    for name, want in zip(rule.torch, wanted, strict=True):
        if name not in tensors:
            yield "missing", name
            continue
        tensor = tensors[name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            yield "no floats", f"{name} ({tensor.dtype})"
        if tensor.shape != want:
            yield "misshapen", f"{name} {tensor.shape} for {want}"
