"""FSP: the flow of solution procedure (Yim et al. 2017)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from hintjax import regressors
from hintjax._checks import Refusal, described, function, instance, message
from hintjax.losses import fsp_matrix, fsp_matrix_loss, fsp_matrix_paper
from hintjax.method import (
    Applied,
    Batch,
    Context,
    Data,
    Method,
    Pairs,
    Reduced,
    hints_of,
    over_pairs,
)
from hintjax.methods._shapes import checked, of_pair
from hintjax.methods._shapes import maps as with_positions
from hintjax.methods._tokens import counted
from hintjax.networks import Features, Wants

Flows = Sequence[tuple[tuple[str, str], tuple[str, str]]]


def fsp(
    pairs: Flows,
    *,
    matrix: Callable[..., Array] = fsp_matrix,
    loss: Callable[[Array, Array], Float[Array, " batch"]] = fsp_matrix_loss,
    regressor: regressors.Sizing | None = None,
    padding: str | None = None,
) -> Method:
    """FSP: the flow between two layers is the same in student and teacher.

    Each flow is first reduced to its FSP matrix. Matrices of one shape are then
    compared at once, by vmap over the pairs, and the losses are summed. The layers may
    be maps, tokens or volumes of any sizes. Their channels must be equal, or a
    regressor maps the student's channels to the teacher's.

    Training has two stages: FSP alone (a hint stage; 30 epochs at weight 1 in the CRD
    benchmark), then the task, which starts from the weights of the first stage. The
    usual flows lie between consecutive stages of a residual network, beginning at the
    stem: see `flows`. As a term beside the task, its documented weight is 50. The
    paper's form is `matrix=fsp_matrix_paper, loss=fsp_matrix_loss_paper`.

    Args:
        pairs: (flow of the student, flow of the teacher) for each pair, where a flow
            is (first layer, second layer) of one network, as paths.
        matrix: the FSP matrix of two maps. With `padding`, it also receives the mask of
            valid positions, as `where`.
        loss: compares two batches of matrices, one value per example.
        regressor: makes the regressor of each layer of the student, for instance
            `regressors.linear`. It receives the layer's shape, and this shape with the
            teacher's channels. By default there is no regressor.
        padding: the name in the batch of the mask of valid positions: bool (batch,
            *positions), True for a valid token or pixel, at the smaller size of each
            flow. By default all positions are valid.

    Returns:
        The method. It trains a regressor for each matched pair of layers if one is
        given, named `guided->hint`, and remembers their BatchNorm statistics.

    Raises:
        ValueError: if there are no pairs, or (when a stage is initialized) if channels
            differ and there is no regressor, if a layer has no positions, or if the
            batch has no such mask.

    References:
        Yim et al. 2017, A Gift from Knowledge Distillation.
    """
    function("fsp", matrix=matrix, loss=loss)
    if regressor is not None:
        function("fsp", regressor=regressor)
    _check_flows(pairs)
    matched = list(
        dict.fromkeys(layers for pair in pairs for layers in zip(*pair, strict=True))
    )
    student_wants, teacher_wants = hints_of("fsp", matched)
    setting = _Setting(pairs, matched, regressor)
    summed = over_pairs(loss)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        return _begin(setting, key, student, teacher)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        masked = {} if padding is None else {"where": counted("fsp", batch, padding)}
        of = partial(matrix, **masked)
        maps, remembered = _matched(
            setting, params, memory, student, teacher, context.train
        )
        students = [
            of(*(maps[layers] for layers in zip(*pair, strict=True))) for pair in pairs
        ]
        teachers = [of(*(teacher.hints[path] for path in flow)) for _, flow in pairs]
        return summed(students, teachers), remembered, {}

    plain = padding is None and matrix in (fsp_matrix, fsp_matrix_paper)
    method = Method(
        student_wants,
        teacher_wants,
        init,
        apply,
        reduced=partial(_reduced, setting, matrix, summed) if plain else None,
    )
    return checked("fsp", matched, method, with_positions)


class _Setting(NamedTuple):
    """The flows, the layers that they match, and how regressors are made for these."""

    pairs: Flows
    matched: list[tuple[str, str]]  # (guided layer, hint layer)
    regressor: regressors.Sizing | None


def _check_flows(pairs: Flows) -> None:
    """Raises unless the pairs are pairs of flows."""
    instance("fsp", Sequence, pairs=pairs)
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            wanted = "each pair to be (flow of the student, flow of the teacher)"
            raise Refusal(
                message("fsp", wanted, described(pair), "See hintjax.methods.flows.")
            )
        hints_of("fsp", pair)


def _modules(
    setting: _Setting, student: Features, teacher: Features
) -> Iterator[tuple[tuple[str, str], str, nn.Module]]:
    """Yields matched layers, their name in the parameters, and their regressor."""
    if setting.regressor is None:
        return
    for guided, hint in setting.matched:
        shape = student.hints[guided].shape[1:]
        target = (*shape[:-1], teacher.hints[hint].shape[-1])
        with of_pair(f"{guided}->{hint}"):
            module = setting.regressor(shape, target)
        yield (guided, hint), f"{guided}->{hint}", module


def _begin(
    setting: _Setting, key: Array, student: Features, teacher: Features
) -> tuple[dict, dict]:
    """`Method.init`: parameters and statistics of the regressors, if there are any."""
    if setting.regressor is None:
        for layers in setting.matched:
            _same_channels(*layers, student, teacher)
    params, memory = {}, {}
    modules = _modules(setting, student, teacher)
    for number, ((guided, _), name, module) in enumerate(modules):
        one, shape = jax.random.fold_in(key, number), student.hints[guided].shape
        params[name], memory[name] = regressors.init(module, one, shape)
    return params, memory


def _matched(
    setting: _Setting,
    params: dict,
    memory: dict,
    student: Features,
    teacher: Features,
    train: bool,
) -> tuple[dict[tuple[str, str], Array], dict]:
    """The student's maps with the teacher's channels, and the regressors' statistics.

    Of the teacher's features only the shapes are read.
    """
    maps = {layers: student.hints[layers[0]] for layers in setting.matched}
    remembered = {}
    for layers, name, module in _modules(setting, student, teacher):
        maps[layers], remembered[name] = regressors.apply(
            module, params[name], memory[name], maps[layers], train
        )
    return maps, remembered


def _reduced(
    setting: _Setting,
    matrix: Callable[..., Array],
    summed: Callable[[Sequence[Array], Sequence[Array]], Float[Array, " batch"]],
    student: Features,
) -> Reduced:
    """`Method.reduced`: the teacher's maps are read as their FSP matrices."""
    theirs = [(first, second) for _, (first, second) in setting.pairs]
    named = {flow: f"fsp({', '.join(flow)})" for flow in theirs}

    def reduce(teacher: Features) -> Features:
        hints = {
            name: matrix(*(teacher.hints[path] for path in flow))
            for flow, name in named.items()
        }
        return Features(teacher.output, hints, teacher.params)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        return _begin(setting, key, student, _channels(teacher, named))

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        shapes = _channels(teacher, named)
        maps, remembered = _matched(
            setting, params, memory, student, shapes, context.train
        )
        students = [
            matrix(*(maps[layers] for layers in zip(*pair, strict=True)))
            for pair in setting.pairs
        ]
        teachers = [teacher.hints[named[flow]] for flow in theirs]
        return summed(students, teachers), remembered, {}

    student_wants, _ = hints_of("fsp", setting.matched)
    wants = Wants(hints=tuple(named.values()))
    return Reduced(reduce, Method(student_wants, wants, init, apply))


def _channels(matrices: Features, named: dict[tuple[str, str], str]) -> Features:
    """Shapes of layers with the channels that their FSP matrices have."""
    channels = {}
    for flow, name in named.items():
        for path, count in zip(flow, matrices.hints[name].shape[-2:], strict=True):
            channels[path] = jax.ShapeDtypeStruct((1, count), float)
    return Features(hints=channels)


def flows(pairs: Pairs) -> Flows:
    """The flows between consecutive layers, as `fsp` takes them.

    Args:
        pairs: (guided layer, hint layer) for each depth, shallow to deep.

    Returns:
        The pairs of flows, one fewer than `pairs`.

    Raises:
        ValueError: if there are fewer than two pairs.

    >>> flows([("stem", "conv"), ("a", "x"), ("b", "y")])
    [(('stem', 'a'), ('conv', 'x')), (('a', 'b'), ('x', 'y'))]
    """
    hints_of("flows", pairs)
    if len(pairs) < 2:
        wanted = "at least two pairs, shallow to deep"
        raise Refusal(message("flows", wanted, f"{list(pairs)}"))
    return [
        ((guided, deeper), (hint, deeper_hint))
        for (guided, hint), (deeper, deeper_hint) in itertools.pairwise(pairs)
    ]


def _same_channels(
    guided: str, hint: str, student: Features, teacher: Features
) -> None:
    """Raise unless the guided layer and the hint layer have the same channels."""
    ours, theirs = student.hints[guided].shape, teacher.hints[hint].shape
    if ours[-1] != theirs[-1]:
        wanted = f"{guided} and {hint} to have the same channels"
        got = f"student {ours} and teacher {theirs}"
        do = "Pass regressor=hintjax.regressors.linear, or choose other layers."
        raise Refusal(message("fsp", wanted, got, do))
