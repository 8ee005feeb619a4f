"""Converts tensors of a torch model to variables of a Flax model by a map of names."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.networks import Variables, join


class How(NamedTuple):
    """How one leaf of a Flax model is made from torch's tensors.

    Attributes:
        axes: names of the leaf's axes, e.g. "height width in out".
        shapes: `(*sizes of the leaf's axes) -> shapes of the tensors`.
        convert: `(shape of the leaf, *tensors) -> leaf`.
        fits: `(shape of a tensor, shape from shapes) -> bool`: whether `convert` takes
            a tensor of this shape; by default only if both are equal.
    """

    axes: str
    shapes: Callable[..., list[tuple[int, ...]]]
    convert: Callable[..., np.ndarray]
    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool] = operator.eq


class Rule(NamedTuple):
    """The names of one leaf and of the tensors that make it.

    Attributes:
        flax: path of the leaf, collection first; `<b>` stands for any number.
        torch: names of the tensors; `<b>` is the same number, `<b-1>` one less.
        how: how the leaf is made from the tensors.
    """

    flax: str
    torch: tuple[str, ...]
    how: How


class Names(NamedTuple):
    """The names of all parts of a model family, in torch and in Flax.

    Attributes:
        rules: the first rule that matches a leaf is used.
        unused: names of tensors that the Flax model does not need; `*` is any text.
        foreign: pairs of a pattern of names and the relative of the family whose files
            have them, but which no model here can read; `*` is any text.
    """

    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()

    def find(self, path: str) -> Rule | None:
        """The rule of one leaf, with its numbers filled in; None if no rule matches.

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
    """Variables of a Flax model from torch's tensors; every tensor must be used.

    Args:
        tensors: tensors by torch's names, e.g. the result of `read_safetensors`.
        names: the map from names in torch to names in the model, e.g. `RESNET`.
        like: variables of the model, or their shapes: `jax.eval_shape(network.init,
            key, images)`.

    Returns:
        Variables with the structure, shapes and dtypes of `like`.

    Raises:
        ValueError: if tensors are missing, left over, misshapen or not floats, or if
            leaves of the model have no rule. The message lists all of them. A file of a
            foreign relative is refused by one of its tensors.

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
    _check_foreign(tensors, names)
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
            # Without a copy jax may go on using numpy's memory, the whole file.
            values.append(jnp.array(made, leaf.dtype, copy=True))
    for name in sorted(set(tensors) - used):
        if not any(fnmatchcase(name, unused) for unused in names.unused):
            problems["left over"][name] = None
    got = [f"{kind}: {', '.join(texts)}" for kind, texts in problems.items() if texts]
    if got:
        wanted = "tensors and model to match one to one"
        do = "Build the model that the file was saved from, or use its map of names."
        raise Refusal(message("from_torch", wanted, "; ".join(got), do))
    collections = jax.tree.unflatten(structure, values)
    return Variables(collections.pop("params"), collections)


def paths(like: Variables) -> list[str]:
    """The paths of all leaves of a model, collection first."""
    leaves = jax.tree.leaves_with_path(join(like))
    return [
        jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves
    ]


def _check_foreign(tensors: Mapping[str, np.ndarray], names: Names) -> None:
    """Raise if a tensor is of a relative that no model here can read."""
    for pattern, relative in names.foreign:
        found = [name for name in sorted(tensors) if fnmatchcase(name, pattern)]
        if found:
            wanted = "the file of a model that HintJAX has"
            got = f"{found[0]!r}, a tensor of {relative}"
            raise Refusal(message("from_torch", wanted, got))


def _numbered(name: str, match: re.Match) -> str:
    """The name with the numbers of the matched path filled in."""
    return re.sub(r"<(\w)(-1)?>", lambda m: str(int(match[m[1]]) - bool(m[2])), name)


def _faults(
    rule: Rule, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Why tensors cannot make a leaf: pairs (kind of problem, description)."""
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
        if not rule.how.fits(tensor.shape, want):
            yield "misshapen", f"{name} {tensor.shape} for {want}"
