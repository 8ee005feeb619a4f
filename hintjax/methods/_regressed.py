"""What methods share that put a regressor on the guided layer of each pair."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Key

from hintjax import regressors
from hintjax._numerics import at_smaller_size
from hintjax.method import Pairs
from hintjax.networks import Features

Level = Callable[[Array, Array], tuple[Array, Array]]


class Pair(NamedTuple):
    """One pair, ready for its regressor."""

    name: str  # guided->hint
    module: nn.Module
    guided: Any
    hint: Any


def smaller(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Maps at the smaller of their two sizes; vectors and tokens as they are."""
    if guided.ndim == hint.ndim == 4:
        return at_smaller_size(guided, hint)
    return guided, hint


def as_they_are(guided: Array, hint: Array) -> tuple[Array, Array]:
    """For regressors that change the size themselves."""
    return guided, hint


def ready(
    pairs: Pairs,
    sizing: regressors.Sizing,
    student: Features,
    teacher: Features,
    level: Level = smaller,
) -> Iterator[Pair]:
    """Each pair at one size, with its regressor; works on shapes too."""
    for guided, hint in pairs:
        ours, theirs = student.hints[guided], teacher.hints[hint]
        if isinstance(ours, jax.ShapeDtypeStruct):
            ours, theirs = jax.eval_shape(level, ours, theirs)
        else:
            ours, theirs = level(ours, theirs)
        module = sizing(ours.shape[1:], theirs.shape[1:])
        yield Pair(f"{guided}->{hint}", module, ours, theirs)


def init(key: Key[Array, ""], pairs: Iterable[Pair]) -> tuple[dict, dict]:
    """Parameters and state of all regressors, by name."""
    params, memory = {}, {}
    for number, (name, module, guided, _) in enumerate(pairs):
        one = jax.random.fold_in(key, number)
        params[name], memory[name] = regressors.init(module, one, guided.shape)
    return params, memory


def apply(
    params: dict, memory: dict, pairs: Iterable[Pair], train: bool
) -> tuple[list[tuple[str, Array, Array]], dict]:
    """(name, prediction, hint) of each pair, and the regressors' state."""
    predictions, remembered = [], {}
    for name, module, guided, hint in pairs:
        predicted, remembered[name] = regressors.apply(
            module, params[name], memory[name], guided, train
        )
        predictions.append((name, predicted, hint))
    return predictions, remembered
