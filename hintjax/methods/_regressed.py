"""Methods with a regressor on the guided layer of each pair."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Key

from hintjax import regressors
from hintjax._numerics import at_smaller_size
from hintjax.method import Data, Pairs
from hintjax.methods._shapes import of_pair
from hintjax.networks import Features

Level = Callable[[Array, Array], tuple[Array, Array]]


class Pair(NamedTuple):
    """One pair of layers at one size, and its regressor."""

    name: str  # guided->hint
    module: nn.Module
    guided: Any
    hint: Any


class Beside(NamedTuple):
    """The regressors of a method, which are trained beside the student.

    Attributes:
        init: `(key, student, teacher, data) -> (params, memory)`, as `Method.init`.
        predict: `(params, memory, student, teacher, train) -> (predictions, memory)`:
            for each pair its name, the prediction and the hint.
    """

    init: Callable[..., tuple[dict, dict]]
    predict: Callable[..., tuple[list[tuple[str, Array, Array]], dict]]


def smaller(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Averages the larger map or volume down; keeps vectors and tokens."""
    if guided.ndim == hint.ndim >= 4:
        return at_smaller_size(guided, hint)
    return guided, hint


def as_they_are(guided: Array, hint: Array) -> tuple[Array, Array]:
    """Keeps both sizes, for regressors that change the size themselves."""
    return guided, hint


def ready(
    pairs: Pairs,
    sizing: regressors.Sizing,
    student: Features,
    teacher: Features,
    level: Level = smaller,
) -> Iterator[Pair]:
    """Each pair at one size, with its regressor; accepts shapes too.

    Args:
        pairs: (guided layer, hint layer) for each pair.
        sizing: makes the regressor of one pair.
        student: the student's features, or their shapes.
        teacher: the teacher's features, or their shapes.
        level: brings the two layers of a pair to one size.

    Yields:
        The pairs, in order.
    """
    for guided, hint in pairs:
        ours, theirs = student.hints[guided], teacher.hints[hint]
        if isinstance(ours, jax.ShapeDtypeStruct):
            ours, theirs = jax.eval_shape(level, ours, theirs)
        else:
            ours, theirs = level(ours, theirs)
        with of_pair(f"{guided}->{hint}"):
            module = sizing(ours.shape[1:], theirs.shape[1:])
        yield Pair(f"{guided}->{hint}", module, ours, theirs)


def beside(pairs: Pairs, sizing: regressors.Sizing, level: Level = smaller) -> Beside:
    """The regressors of all pairs, as functions on the features of both networks.

    Args:
        pairs: (guided layer, hint layer) for each pair.
        sizing: makes the regressor of one pair.
        level: brings the two layers of a pair to one size.

    Returns:
        `init` and `predict`. The parameters and the state are dicts by `guided->hint`.
    """

    def init(
        key: Key[Array, ""], student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params, memory = {}, {}
        ready_pairs = ready(pairs, sizing, student, teacher, level)
        for number, (name, module, guided, _) in enumerate(ready_pairs):
            one = jax.random.fold_in(key, number)
            params[name], memory[name] = regressors.init(module, one, guided.shape)
        return params, memory

    def predict(
        params: dict, memory: dict, student: Features, teacher: Features, train: bool
    ) -> tuple[list[tuple[str, Array, Array]], dict]:
        predictions, remembered = [], {}
        ready_pairs = ready(pairs, sizing, student, teacher, level)
        for name, module, guided, hint in ready_pairs:
            predicted, remembered[name] = regressors.apply(
                module, params[name], memory[name], guided, train
            )
            predictions.append((name, predicted, hint))
        return predictions, remembered

    return Beside(init, predict)
