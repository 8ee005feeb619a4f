"""The shapes of the layers of a pair, checked before any loss is computed."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from hintjax._checks import Refusal, described, message
from hintjax.method import Method, Pairs

Shape = tuple[int, ...]
Fit = Callable[[Shape, Shape], tuple[str, str] | None]


def vectors(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers of which every example has features, as many axes as you like.

    Args:
        student: shape of the guided layer, with the batch.
        teacher: shape of the hint layer, with the batch.

    Returns:
        None if the two layers fit, else the layers that are wanted, and the advice.
    """
    if min(len(student), len(teacher)) < 2:
        do = "Name a layer whose output has one array of features for each example."
        return "to be (batch, *positions, channels)", do
    return None


def maps(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers with positions, on as many axes in both; sizes and channels may differ.

    See `vectors` for the arguments and the result.
    """
    if min(len(student), len(teacher)) < 3:
        do = "Name layers before the pooling, or a method that compares vectors."
        return "to be (batch, *positions, channels) with one or more positions axes", do
    if len(student) != len(teacher):
        do = "View tokens as a map with hintjax.viewed and regressors.to_grid."
        return "to have positions on the same number of axes", do
    return None


def same_positions(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers with the same positions; the channels may differ.

    See `vectors` for the arguments and the result.
    """
    if student[:-1] != teacher[:-1]:
        do = "hintjax.viewed drops the tokens that one network alone has."
        return maps(student, teacher) or ("to have the same positions", do)
    return maps(student, teacher)


def alike(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers of the same shape, because nothing stands between them.

    See `vectors` for the arguments and the result.
    """
    if student != teacher:
        do = "Put a regressor between them, as hintjax.fitnets(pairs, loss=...) does."
        return "to have the same shape", do
    return vectors(student, teacher)


def examples(least: int) -> Fit:
    """Batches of enough examples for a loss that compares them with each other.

    Args:
        least: the number of examples below which the loss is constant.

    Returns:
        The fit, for the first batch of a method: a later batch may be smaller.
    """

    def fit(student: Shape, teacher: Shape) -> tuple[str, str] | None:
        if vectors(student, teacher) is None and min(student[0], teacher[0]) < least:
            do = "The loss compares examples: pass a whole batch to the stage's init."
            return f"to have {least} examples or more", do
        return None

    return fit


def places(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers of two positions or more, for a loss that is constant with one.

    See `vectors` for the arguments and the result.
    """
    fewest = min(math.prod(shape[1:-1]) for shape in (student, teacher))
    if maps(student, teacher) is None and fewest < 2:
        do = "With one the loss is constant: name layers before the pooling."
        return "to have two positions or more", do
    return None


def directions(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers of two channels or more: one channel has a sign, and no direction.

    See `vectors` for the arguments and the result.
    """
    if vectors(student, teacher) is None and min(student[-1], teacher[-1]) < 2:
        do = "With one the loss is constant: use a method that compares sizes."
        return "to have two channels or more", do
    return None


def checked(
    caller: str,
    pairs: Pairs,
    method: Method,
    fit: Fit = vectors,
    first: Fit | None = None,
) -> Method:
    """The same method, which refuses layers that do not fit before it reads them.

    Args:
        caller: the name of the method, for messages.
        pairs: (guided layer, hint layer) for each pair.
        method: the method.
        fit: the shapes that the method can work with: `vectors`, `maps` or `alike`.
        first: the shapes with which it can begin. With others its loss is constant,
            and the student would not move: `examples`, `places` or `directions`.

    Returns:
        The method. Its `init` and its `apply` raise a `Refusal` if the layers of a pair
        do not fit, or if their first axis is not the batch.
    """

    def check(student, teacher, batch, fit=fit):
        examples = examples_of(batch)
        for guided, hint in pairs:
            layers = {guided: student.hints[guided]}, {hint: teacher.hints[hint]}
            check_pair(caller, *layers, examples, fit)

    def init(key, student, teacher, data):
        check(student, teacher, {})
        if first is not None:
            check(student, teacher, {}, first)
        return method.init(key, student, teacher, data)

    def apply(params, memory, student, teacher, batch, context):
        check(student, teacher, batch)
        return method.apply(params, memory, student, teacher, batch, context)

    return method._replace(init=init, apply=apply)


def check_pair(
    caller: str,
    student: dict[str, Any],
    teacher: dict[str, Any],
    examples: int | None,
    fit: Fit,
) -> None:
    """Raise unless two layers fit, and both have the batch as their first axis.

    Args:
        caller: the name of the method, for messages.
        student: the guided layer, or its shape, by its path.
        teacher: the hint layer, or its shape, by its path.
        examples: number of examples in the batch, if it is known.
        fit: the shapes that the method can work with.
    """
    ((guided, ours),), ((hint, theirs),) = student.items(), teacher.items()
    where = f"{guided} (student) and {hint} (teacher)"
    if not (hasattr(ours, "shape") and hasattr(theirs, "shape")):
        got = f"{described(ours)} and {described(theirs)}"
        raise Refusal(message(caller, f"{where} to be arrays", got))
    got = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    problem = fit(tuple(ours.shape), tuple(theirs.shape))
    first = {ours.shape[:1], theirs.shape[:1]}
    first |= set() if examples is None else {(examples,)}
    if len(first) > 1:
        count = "" if examples is None else f" of {examples}"
        do = "Move the axis of the examples to the front with hintjax.viewed."
        problem = f"to have the batch{count} as their first axis", do
        problem = vectors(tuple(ours.shape), tuple(theirs.shape)) or problem
    if problem is not None:
        wanted, do = problem
        raise Refusal(message(caller, f"{where} {wanted}", got, do))


@contextlib.contextmanager
def of_pair(name: str) -> Iterator[None]:
    """Puts the name of a pair in front of every `Refusal` of a block.

    Args:
        name: the pair, `guided->hint`.
    """
    try:
        yield
    except Refusal as error:
        raise type(error)(f"{name}: {error}") from None


def examples_of(batch: Mapping[str, Any]) -> int | None:
    """Returns the size of the first axis, if all arrays of the batch have the same."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape}
    return sizes.pop() if len(sizes) == 1 else None
