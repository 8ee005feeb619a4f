"""Dense matching of a foundation model's features (RADIO, PHI-S, lightly v2)."""

from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType

import flax.linen as nn
from jaxtyping import Array, Float

from hintjax import regressors
from hintjax._checks import Refusal, function, instance, message, positive_int
from hintjax._numerics import as_float
from hintjax.losses import Standardization, hint_loss, standardize_features
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of
from hintjax.methods import _regressed
from hintjax.methods._shapes import Shape, checked, vectors
from hintjax.methods.fitnets import scored
from hintjax.networks import Features
from hintjax.regressors.grids import grid_of, to_grid


def of_teacher(student: int, teacher: int) -> int:
    """The teacher's size of an axis: the grid on which lightly compares features."""
    return teacher


def dense_matching(
    pairs: Pairs,
    *,
    standardization: Sequence[Standardization] | None = None,
    regressor: regressors.Sizing = regressors.linear,
    loss: Callable[..., Float[Array, " batch"]] = hint_loss,
    size: Callable[[int, int], int] = of_teacher,
    resize: Callable[[Array, tuple[int, ...]], Array] = regressors.bilinear_resize,
    padding: str | None = None,
) -> Method:
    """Dense matching: the student predicts the teacher's features at every position.

    L = loss(resize(g(s)), resize(W (t - m)))

    A regressor g predicts the teacher's channels on the student's grid. Both are then
    brought to one grid, and the teacher's features are standardized. No labels are
    needed. With `hint_loss` it is lightly v2; with a `phi_standardization` it is the
    loss of RADIO's PHI-S.

    Maps (batch, h, w, c) and tokens (batch, n, c) can be paired in any combination.
    Tokens form a square grid in reading order; drop class tokens with
    `hintjax.viewed` and `regressors.to_grid`. If both layers have the same number of
    tokens, they stay tokens. Vectors (batch, c) can be paired, too.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of the
            pairs are summed.
        standardization: the transform of the hint of each pair, in order; by default
            the hints are matched as they are. `hintjax.losses.feature_moments` and
            `phi_standardization` estimate one.
        regressor: makes the regressor of one pair from the shape of the guided layer
            and the same shape with the hint's channels. lightly takes `linear`.
        loss: compares a prediction with its hint, one value per example. With
            `padding`, it also receives the mask of valid positions, as `where`.
        size: `(student, teacher) -> size` of each axis of the grid on which features
            are compared: by default the teacher's. AM-RADIO takes `max`.
        resize: `(x, size) -> x` of this size, for layers (batch, *positions, c).
        padding: the name in the batch of the mask of valid positions of that grid.

    Returns:
        The method. It trains one regressor per pair, named `guided->hint`; remembers
        the transforms under "standardization", because another device may find
        other ones; reports `r2` as `fitnets` does, of the standardized hints.

    Raises:
        ValueError: if there are no pairs or not one transform per pair; when a stage is
            initialized, if the positions of a pair cannot be brought to one grid, or
            if the channels of a transform are not the hint's.

    Convention:
        `.mean()` is the mean squared error of PHI-S, and of lightly v2 for one hint.
        lightly predicts the last two blocks of the teacher at once and takes the mean
        over both; two pairs give twice its value.

    References:
        Ranzinger et al. 2024, AM-RADIO: Agglomerative Vision Foundation Model;
        Ranzinger et al. 2024, PHI-S: Distribution Balancing for Label-Free
        Multi-Teacher Distillation; lightly-train, code (distillationv2.py).
    """
    caller = "dense_matching"
    function(caller, regressor=regressor, loss=loss, size=size, resize=resize)
    student_wants, teacher_wants = hints_of(caller, pairs)
    transforms = _transforms(caller, pairs, standardization)

    def sized(student: Shape, teacher: Shape) -> nn.Module:
        projection = regressor(student, (*student[:-1], teacher[-1]))
        return regressors.Resized(projection, teacher[:-1], resize)

    level = partial(_on_grids, size=size, resize=resize)
    beside = _regressed.beside(pairs, sized, level)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params, states = beside.init(key, student, teacher, data)
        for guided, hint in pairs if transforms else ():
            name, channels = f"{guided}->{hint}", teacher.hints[hint].shape[-1]
            got = transforms[name].mean.shape[-1]
            if got != channels:
                wanted = f"a standardization of {name} for {channels} channels"
                do = "Estimate it on features of the hint layer."
                raise Refusal(message(caller, wanted, f"{got}", do))
        return params, {"regressors": states, "standardization": transforms}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        predictions, states = beside.predict(
            params, memory["regressors"], student, teacher, context.train
        )
        known = memory["standardization"]
        predictions = [
            (name, y, standardize_features(t, known[name]) if known else t)
            for name, y, t in predictions
        ]
        values, metrics = scored(caller, predictions, loss, batch, padding)
        return values, {**memory, "regressors": states}, metrics

    method = Method(student_wants, teacher_wants, init, apply)
    return checked(caller, pairs, method, _grids)


def _transforms(
    caller: str, pairs: Pairs, standardization: Sequence[Standardization] | None
) -> dict[str, Standardization]:
    """Returns the transform of each pair by its name; none without a standardization.

    Standardizing at the end is the same as at the start: a resize is linear, and its
    weights sum to 1.
    """
    if standardization is None:
        return {}
    do = "Give a list with one transform for each pair."
    instance(caller, (Sequence, NoneType), do, standardization=standardization)
    given = list(standardization)
    if len(given) != len(pairs) or any(type(x) is not Standardization for x in given):
        wanted = f"standardization to be {len(pairs)} transforms, one for each pair"
        raise Refusal(message(caller, wanted, f"{len(given)} entries", do))
    names = [f"{guided}->{hint}" for guided, hint in pairs]
    return dict(zip(names, given, strict=True))


def _as_grid(shape: Shape) -> tuple[int, ...]:
    """The positions of a layer (batch, *positions, c), of tokens on a square grid."""
    if len(shape) != 3:
        return shape[1:-1]
    return grid_of("dense_matching", shape[1], 0, "the first tokens dropped")


def _grids(student: Shape, teacher: Shape) -> tuple[str, str] | None:
    """Layers that can be brought to one grid; see `_shapes.vectors`."""
    if student[1:-1] == teacher[1:-1] or min(len(student), len(teacher)) < 2:
        return vectors(student, teacher)
    axes = {len(shape) if len(shape) != 3 else 4 for shape in (student, teacher)}
    if len(axes) > 1:
        do = "Pool the layer with positions, or name layers with positions in both."
        return "to have positions on the same number of axes", do
    return None


def _on_grids(
    guided: Array,
    hint: Array,
    size: Callable[[int, int], int],
    resize: Callable[[Array, tuple[int, ...]], Array],
) -> tuple[Array, Array]:
    """Returns the guided layer on its own grid, and the hint on the grid to compare."""
    if guided.shape[1:-1] == hint.shape[1:-1]:
        return guided, hint
    grids = _as_grid(guided.shape), _as_grid(hint.shape)
    hint = as_float("dense_matching", hint)
    guided, hint = (
        to_grid(x, size=(grid[0], grid[1])) if x.ndim == 3 else x
        for x, grid in zip((guided, hint), grids, strict=True)
    )
    compared = tuple(map(size, *grids))
    positive_int(
        "dense_matching", **{f"size of axis {i}": n for i, n in enumerate(compared)}
    )
    return guided, resize(hint, compared)
