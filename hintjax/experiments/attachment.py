"""Places: where each published method attaches to two networks.

Every function takes `Places` and returns pairs (guided layer, hint layer): the pairs of
the user, or else the pairs of the method's authors. Only shapes are read.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from hintjax import pairing, regressors
from hintjax._checks import Refusal, message
from hintjax.losses import Standardization
from hintjax.method import Method, Pairs
from hintjax.networks.paths import OUTPUT
from hintjax.views import viewed

Layers = Mapping[str, jax.ShapeDtypeStruct]


class Places(NamedTuple):
    """The facts of a run that a recipe reads besides its config, such as its layers.

    Attributes:
        student: layers of the student.
        teacher: layers of the teacher; none if there is no teacher.
        pairs: pairs of the user, which replace a method's usual pairs.
        preactivations: for student and teacher, a layer's value before its ReLU by the
            path of the layer, as far as the models name it.
        norms: BatchNorm before the ReLU, by the path of the teacher's layer.
        class_tokens: for student and teacher, the number of tokens before the patches.
        examples: number of training examples.
        labels: number of training examples with a label; None if all have one.
        standardizations: transforms of hint layers, by path, for methods that predict
            standardized features; a layer without one keeps its features until the
            teacher is there.
        same_outputs: whether the outputs of both networks have one shape, so that they
            can be compared. They differ if the teacher was trained on other classes.
        adjustable: whether the weight of a method is a value of the state, so that
            students of one compiled program can have different weights.
        mesh: mesh on which the run trains, over which a method may shard its memory;
            None for a single device.
    """

    student: Layers
    teacher: Layers
    pairs: tuple[tuple[str, str], ...] = ()
    preactivations: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    norms: Mapping[str, str] = {}
    class_tokens: tuple[int, int] = (0, 0)
    examples: int = 0
    labels: int | None = None
    standardizations: Mapping[str, Standardization] = {}
    same_outputs: bool = True
    adjustable: bool = False
    mesh: Mesh | None = None


def outputs(places: Places) -> Pairs:
    """The outputs."""
    return ()


def middle(places: Places) -> Pairs:
    """The middle of both networks."""
    return places.pairs or pairing.suggest_pairs(places.student, places.teacher)


def stages(places: Places) -> Pairs:
    """The ends of the stages."""
    return places.pairs or pairing.stage_pairs(places.student, places.teacher)


def last_stage(places: Places) -> Pairs:
    """The end of the last stage."""
    return stages(places)[-1:]


def middle_stage(places: Places) -> Pairs:
    """The end of the middle stage."""
    ends = stages(places)
    return ends[(len(ends) - 1) // 2 :][:1]


def first_and_stages(places: Places) -> Pairs:
    """The first layers and the ends of the stages."""
    if places.pairs:
        return places.pairs
    first = pairing.first_pair(places.student, places.teacher)
    return tuple(dict.fromkeys((first, *stages(places))))


def before_relu(places: Places) -> Pairs:
    """The ends of the stages before their ReLU, which the models must name."""
    if places.pairs:
        return places.pairs
    found = []
    for pair in stages(places):
        for path, known in zip(pair, places.preactivations, strict=True):
            if path not in known:
                wanted = f"a model that names {path} before its ReLU"
                got = f"{list(known)}"
                do = "Name the layers with --pairs."
                raise Refusal(message("recipe", wanted, got, do))
        (guided, hint), (ours, theirs) = pair, places.preactivations
        found.append((ours[guided], theirs[hint]))
    return tuple(found)


def but_last(places: Places) -> Pairs:
    """The ends of the stages without the last stage."""
    return places.pairs or stages(places)[:-1]


def hidden_and_scores(places: Places) -> Pairs:
    """The ends of the stages (a third of the blocks each), and attention scores."""
    return (*stages(places), *inside(places, stages(places), "scores"))


def last_relations(places: Places) -> Pairs:
    """Queries, keys and values of the last blocks."""
    if places.pairs:
        return places.pairs
    last = last_stage(places)
    names = ("query", "key", "value")
    found = [pair for name in names for pair in inside(places, last, name)]
    if not found:
        wanted = "queries, keys and values as layers of the last blocks"
        got = f"{last} without them"
        raise Refusal(message("recipe", wanted, got, "Name them with --pairs."))
    return tuple(found)


def inside(places: Places, pairs: Pairs, name: str) -> Pairs:
    """For each pair of blocks, the pair of layers with this name inside them."""

    def find(layers: Layers, block: str) -> str | None:
        inside = (path for path in layers if path.startswith(f"{block}/"))
        return next((path for path in inside if path.endswith(f"/{name}")), None)

    found = [
        (find(places.student, guided), find(places.teacher, hint))
        for guided, hint in pairs
    ]
    return [(ours, theirs) for ours, theirs in found if ours and theirs]


def pooled(places: Places) -> Pairs:
    """The pooled vectors, which the classifiers read."""
    if places.pairs:
        return places.pairs
    return ((pool(places.student), pool(places.teacher)),)


def stages_and_pooled(places: Places) -> Pairs:
    """The ends of the stages (the teacher's before ReLU), and the pooled vectors."""
    if places.pairs:
        return places.pairs
    before = places.preactivations[1]
    ends = ((guided, before.get(hint, hint)) for guided, hint in stages(places))
    return (*ends, *pooled(places))


def last_maps(places: Places) -> Pairs:
    """The last maps, which are pooled for the classifiers."""
    return places.pairs or (
        (f"{pool(places.student)}:in", f"{pool(places.teacher)}:in"),
    )


def pool(layers: Layers) -> str:
    """The layer of the pooled vector."""
    return pairing.head(layers)[0]


def classifier(layers: Layers) -> str:
    """The layer of the logits."""
    return pairing.head(layers)[1]


def compares_outputs(method: Method, places: Places) -> bool:
    """Whether a method needs outputs of one shape: it reads the teacher's classifier.

    It reads the classifier's output (KD), or its parameters (SimKD, CAT-KD).
    """
    vectors = [
        path
        for path, layer in places.teacher.items()
        if len(layer.shape) == 2 and not path.startswith(OUTPUT)
    ]
    return method.teacher.output or bool({*vectors[-1:]} & {*method.teacher.params})


def one(pairs: Pairs) -> tuple[str, str]:
    """The only pair of a method that takes one pair."""
    if len(pairs) != 1:
        raise Refusal(message("recipe", "one pair for this method", f"{pairs}"))
    return pairs[0]


def without_class_tokens(method: Method, places: Places) -> Method:
    """Shows the tokens of both networks as maps, without their class tokens."""
    ours, theirs = (functools.partial(as_map, drop=n) for n in places.class_tokens)
    return viewed(method, student=ours, teacher=theirs)


def as_map(x: jax.Array, drop: int) -> jax.Array:
    """Tokens as a map, without the first `drop` tokens; maps stay as they are."""
    return regressors.to_grid(x, drop=drop) if x.ndim == 3 else x


def on_grids(method: Method, places: Places) -> Method:
    """Shows the tokens of one network as maps where the other network has maps."""
    networks = (places.student, places.teacher)
    ours, theirs = (
        {len(layers[path].shape) for path in wants.hints if path in layers}
        for wants, layers in zip(
            (method.student, method.teacher), networks, strict=True
        )
    )

    def view(
        ours: set[int], theirs: set[int], drop: int
    ) -> Callable[[jax.Array], jax.Array] | None:
        if not (3 in ours and 4 in theirs):
            return None
        return functools.partial(as_map, drop=drop)

    return viewed(
        method,
        student=view(ours, theirs, places.class_tokens[0]),
        teacher=view(theirs, ours, places.class_tokens[1]),
    )
