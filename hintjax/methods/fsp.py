"""FSP: the flow of solution procedure (Yim et al. 2017)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

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
    """FSP: what happens between two layers is the same in student and teacher.

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
    instance("fsp", Sequence, pairs=pairs)
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            wanted = "each pair to be (flow of the student, flow of the teacher)"
            raise Refusal(
                message("fsp", wanted, described(pair), "See hintjax.methods.flows.")
            )
        hints_of("fsp", pair)
    matched = list(
        dict.fromkeys(layers for pair in pairs for layers in zip(*pair, strict=True))
    )
    student_wants, teacher_wants = hints_of("fsp", matched)
    summed = over_pairs(loss)
    theirs = [(first, second) for _, (first, second) in pairs]
    named = {flow: f"fsp({', '.join(flow)})" for flow in theirs}

    def sized(
        sizing: regressors.Sizing, student: Features, teacher: Features
    ) -> Iterator[tuple[tuple[str, str], str, nn.Module]]:
        for guided, hint in matched:
            shape = student.hints[guided].shape[1:]
            target = (*shape[:-1], teacher.hints[hint].shape[-1])
            with of_pair(f"{guided}->{hint}"):
                module = sizing(shape, target)
            yield (guided, hint), f"{guided}->{hint}", module

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        if regressor is None:
            for layers in matched:
                _same_channels(*layers, student, teacher)
            return {}, {}
        params, memory = {}, {}
        for number, (layers, name, module) in enumerate(
            sized(regressor, student, teacher)
        ):
            one, shape = jax.random.fold_in(key, number), student.hints[layers[0]].shape
            params[name], memory[name] = regressors.init(module, one, shape)
        return params, memory

    def of_student(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        of: Callable[..., Array],
        train: bool,
    ) -> tuple[list[Array], dict]:
        maps = {layers: student.hints[layers[0]] for layers in matched}
        remembered = {}
        matching = sized(regressor, student, teacher) if regressor else ()
        for layers, name, module in matching:
            maps[layers], remembered[name] = regressors.apply(
                module, params[name], memory[name], maps[layers], train
            )
        students = [
            of(*(maps[layers] for layers in zip(*pair, strict=True))) for pair in pairs
        ]
        return students, remembered

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
        students, remembered = of_student(
            params, memory, student, teacher, of, context.train
        )
        teachers = [of(*(teacher.hints[path] for path in flow)) for _, flow in pairs]
        return summed(students, teachers), remembered, {}

    def apply_to_matrices(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        shapes = _channels(teacher, named)
        students, remembered = of_student(
            params, memory, student, shapes, matrix, context.train
        )
        teachers = [teacher.hints[named[flow]] for flow in theirs]
        return summed(students, teachers), remembered, {}

    def reduced(student: Features) -> Reduced:
        def reduce(teacher: Features) -> Features:
            hints = {
                name: matrix(*(teacher.hints[path] for path in flow))
                for flow, name in named.items()
            }
            return Features(teacher.output, hints, teacher.params)

        method = Method(
            student_wants,
            Wants(hints=tuple(named.values())),
            lambda key, ours, theirs, data: init(
                key, ours, _channels(theirs, named), data
            ),
            apply_to_matrices,
        )
        return Reduced(reduce, method)

    plain = padding is None and matrix in (fsp_matrix, fsp_matrix_paper)
    method = Method(
        student_wants, teacher_wants, init, apply, reduced=reduced if plain else None
    )
    return checked("fsp", matched, method, with_positions)


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
