"""Recipes: the published way to train with each method, as phases of a run.

A recipe says where its method attaches to two networks, with which weight, in which
stages. It sees the shapes of layers, never data.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import optax

from hintjax import pairing, regressors
from hintjax._checks import message
from hintjax.config import Config
from hintjax.method import Method, Pairs, Weight, objective, task, weighted
from hintjax.methods import (
    AnchorNegatives,
    BatchNegatives,
    SharedNegatives,
    activation_boundary,
    attention_transfer,
    channel_wise,
    class_attention,
    correlation_congruence,
    cosine,
    crd,
    crd_bytes,
    decoupled_kd,
    dist,
    factor_transfer,
    fitnets,
    flows,
    fsp,
    kd,
    lambda_decay,
    masked_generation,
    minilm,
    overhaul,
    patient,
    probability_transfer,
    relational,
    review,
    selectivity,
    similarity_preserving,
    simkd,
    soft_targets,
    standardized_kd,
    tinybert,
    variational,
    warm_up,
)
from hintjax.views import viewed

Layers = Mapping[str, jax.ShapeDtypeStruct]


class Places(NamedTuple):
    """What a recipe knows of the networks, and of the size of the data.

    Attributes:
        student: its layers.
        teacher: its layers; none if there is no teacher.
        pairs: what the user gave, instead of a method's usual places.
        preactivations: of student and teacher: for layers, what they are before the
            ReLU, as far as the models say so.
        norms: for layers of the teacher, the BatchNorm before the ReLU.
        class_tokens: of student and teacher: how many tokens come before the patches.
        examples: in the training set.
    """

    student: Layers
    teacher: Layers
    pairs: tuple[tuple[str, str], ...] = ()
    preactivations: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    norms: Mapping[str, str] = {}
    class_tokens: tuple[int, int] = (0, 0)
    examples: int = 0


class Step(NamedTuple):
    """One phase of a recipe: a method in a stage, for a share of the epochs.

    Attributes:
        name: of the phase, in the metrics.
        method: what is trained.
        epochs: how long.
        hints_only: whether it is a hint stage.
        carry: see `hintjax.train.Phase`.
        rates: see `distillation_stage`.
        note: what to tell the user before it starts.
    """

    name: str
    method: Method
    epochs: int
    hints_only: bool = False
    carry: bool = False
    rates: Mapping[str, float] = {}
    note: str = ""


# (config, places, steps in an epoch, epochs) -> the phases of a run.
Recipe = Callable[..., Sequence[Step]]
Where = Callable[[Places], Pairs]
Make = Callable[[Config, Places], Method]


# Where methods attach


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
    """The ends of the stages before their ReLU, which the models must know."""
    if places.pairs:
        return places.pairs
    found = []
    for pair in stages(places):
        for path, known in zip(pair, places.preactivations, strict=True):
            if path not in known:
                wanted = f"the model to say what {path} is before its ReLU"
                got = f"{list(known)}"
                do = "Name the layers with --pairs."
                raise ValueError(message("recipe", wanted, got, do))
        found.append(tuple(map(dict.get, places.preactivations, pair)))
    return tuple(found)


def but_last(places: Places) -> Pairs:
    """The ends of the stages but the last."""
    return places.pairs or stages(places)[:-1]


def hidden_and_scores(places: Places) -> Pairs:
    """The ends of the stages (of blocks, a third each), and their attention scores."""
    return (*stages(places), *_inside(places, stages(places), "scores"))


def last_relations(places: Places) -> Pairs:
    """Queries, keys and values of the last blocks."""
    if places.pairs:
        return places.pairs
    last = last_stage(places)
    names = ("query", "key", "value")
    found = [pair for name in names for pair in _inside(places, last, name)]
    if not found:
        wanted = "queries, keys and values as layers of the last blocks"
        got = f"{last} without them"
        raise ValueError(message("recipe", wanted, got, "Name them with --pairs."))
    return tuple(found)


def _inside(places, pairs, name):
    """For each pair of blocks, the pair of layers of this name inside them."""

    def find(layers, block):
        inside = (path for path in layers if path.startswith(f"{block}/"))
        return next((path for path in inside if path.endswith(f"/{name}")), None)

    found = [
        (find(places.student, guided), find(places.teacher, hint))
        for guided, hint in pairs
    ]
    return [pair for pair in found if None not in pair]


def pooled(places: Places) -> Pairs:
    """The pooled vectors, which the classifiers are given."""
    if places.pairs:
        return places.pairs
    return ((_pool(places.student), _pool(places.teacher)),)


def stages_and_pooled(places: Places) -> Pairs:
    """The ends of the stages, the teacher's before their ReLU; the pooled vectors."""
    if places.pairs:
        return places.pairs
    before = places.preactivations[1]
    ends = ((guided, before.get(hint, hint)) for guided, hint in stages(places))
    return (*ends, *pooled(places))


def last_maps(places: Places) -> Pairs:
    """The last maps, which are pooled for the classifiers."""
    return places.pairs or (
        (f"{_pool(places.student)}:in", f"{_pool(places.teacher)}:in"),
    )


def _pool(layers):
    return pairing.head(layers)[0]


def _classifier(layers):
    return pairing.head(layers)[1]


def _one(pairs):
    if len(pairs) != 1:
        raise ValueError(message("recipe", "one pair for this method", f"{pairs}"))
    return pairs[0]


# The three ways to train


def cross_entropy() -> Method:
    """The task of image classification."""
    return task(optax.softmax_cross_entropy_with_integer_labels)


def backprop(
    config: Config, places: Places, per_epoch: int, epochs: int | None = None
) -> list[Step]:
    """The recipe of the task alone; also how a teacher is trained."""
    return [Step("backprop", objective(task=cross_entropy()), epochs or config.epochs)]


class Grown(NamedTuple):
    """A weight that grows over a twelfth of the epochs; 20 of 240 as published."""

    weight: float

    def __call__(self, epochs: int, per_epoch: int) -> Weight:
        """The schedule."""
        return warm_up(self.weight, max(1, epochs // 12), per_epoch)

    def __str__(self):
        return f"{self.weight:g}, grown"


class Falling(NamedTuple):
    """FitNets' lambda, which falls over all epochs of its stage."""

    first: float
    last: float

    def __call__(self, epochs: int, per_epoch: int) -> Weight:
        """The schedule."""
        return lambda_decay(self.first, self.last, 0, epochs, per_epoch)

    def __str__(self):
        return f"{self.first:g}, falling to {self.last:g}"


class Beside(NamedTuple):
    """The recipe of a method beside the task, after its `prepare` if it has one.

    `config.weight`, `config.task_weight` and `config.kd_weight` (KD as a third term)
    override the published weights.

    Attributes:
        method: of `hintjax.methods`; its name is the term's and the phase's.
        where: it attaches.
        weight: its published weight.
        make: the method as a run trains it; by default of the pairs alone.
        task_weight: of the task.
        note: see `Step`.
        name: instead of the method's.
    """

    method: Callable[..., Method]
    where: Where
    weight: float | Grown | Falling
    make: Make | None = None
    task_weight: float = 1.0
    note: Callable[[Config, Places], str] = lambda config, places: ""
    name: str = ""

    def __call__(self, config, places, per_epoch, epochs=None) -> list[Step]:
        """The phases."""
        epochs = epochs or config.epochs
        method = _made(self, config, places)
        before = 0 if method.prepare is None else _share(config, 9)
        rest = epochs - before
        usual = self.weight
        if not isinstance(usual, float):
            usual = usual(rest, per_epoch)
        name = self.name or self.method.__name__
        terms = {
            "task": weighted(
                cross_entropy(), _or(config.task_weight, self.task_weight)
            ),
            name: weighted(method, _or(config.weight, usual)),
        }
        if config.kd_weight:
            term = kd(_or(config.temperature, 4.0))
            terms["logits"] = weighted(term, config.kd_weight)
        whole, note = objective(**terms), self.note(config, places)
        if not before:
            return [Step(name, whole, epochs, note=note)]
        return [
            Step(f"before {name}", whole.prepare, before, hints_only=True),
            Step(name, whole, rest, carry=True, note=note),
        ]


class BeforeTask(NamedTuple):
    """The recipe of a hint stage with the method alone, then another recipe.

    Attributes:
        method: see `Beside`.
        where: see `Beside`.
        make: see `Beside`.
        after: the recipe that follows, from the student so initialised.
        part: the hint stage has this part of all epochs, unless the config says
            otherwise; 30 of 270 in the CRD benchmark.
    """

    method: Callable[..., Method]
    where: Where
    make: Make | None = None
    after: Recipe = backprop
    part: int = 9
    weight: float = 1.0

    def __call__(self, config, places, per_epoch, epochs=None) -> list[Step]:
        """The phases."""
        before = _share(config, self.part)
        name = self.method.__name__
        method = objective(**{name: _made(self, config, places)})
        rates = {}
        if config.hinted_rate != 1:
            rates = {path: config.hinted_rate for path in method.student.hints}
        rest = (epochs or config.epochs) - before
        return [
            Step(name, method, before, hints_only=True),
            *(
                step._replace(rates=rates)
                for step in self.after(config, places, per_epoch, rest)
            ),
        ]


class Alone(NamedTuple):
    """The recipe of a method without the task.

    Attributes:
        method: see `Beside`.
        where: see `Beside`.
        make: see `Beside`.
    """

    method: Callable[..., Method]
    where: Where
    make: Make | None = None
    weight: float = 1.0

    def __call__(self, config, places, per_epoch, epochs=None) -> list[Step]:
        """The phases."""
        name = self.method.__name__
        method = objective(**{name: _made(self, config, places)})
        return [Step(name, method, epochs or config.epochs)]


def _made(recipe, config, places):
    if recipe.make is None:
        method = recipe.method(recipe.where(places))
    else:
        method = recipe.make(config, places)
    return _on_grids(method, places)


def _on_grids(method, places):
    """The tokens of one network as maps, where the other network shows maps."""
    networks = (places.student, places.teacher)
    ranks = [
        {len(layers[path].shape) for path in wants.hints if path in layers}
        for wants, layers in zip((method.student, method.teacher), networks)
    ]

    def view(ours, theirs, drop):
        if not (3 in ours and 4 in theirs):
            return None
        return lambda x: regressors.to_grid(x, drop=drop) if x.ndim == 3 else x

    return viewed(
        method,
        student=view(*ranks, places.class_tokens[0]),
        teacher=view(*reversed(ranks), places.class_tokens[1]),
    )


def _share(config, part):
    """Epochs of the stage before."""
    first = config.hint_epochs or max(1, config.epochs // part)
    if first >= config.epochs:
        wanted = f"epochs >= 2 of {config.method}, one for each stage"
        raise ValueError(message("config", wanted, f"{config.epochs}"))
    return first


def _or(value: float | None, usual: Weight) -> Weight:
    return usual if value is None else value


# The recipes of the published methods


def _softened(method, temperature):
    """Of outputs, at the config's temperature or the published one."""

    def make(config, places):
        return method(temperature=_or(config.temperature, temperature))

    return make


def _hints_jointly(config, places):
    sizing = functools.partial(regressors.conv, batch_norm=True, activation=nn.relu)
    return fitnets(middle_stage(places), regressor=sizing)


def _flows(config, places):
    pairs = first_and_stages(places)
    known = [
        (places.student[guided].shape[-1], places.teacher[hint].shape[-1])
        for guided, hint in pairs
        if guided in places.student and hint in places.teacher
    ]
    unequal = any(ours != theirs for ours, theirs in known)
    return fsp(flows(pairs), regressor=regressors.linear if unequal else None)


def _contrastive(name, negatives):
    def kind(config, places):
        return negatives(min(config.negatives, places.examples))

    def make(config, places):
        return crd(_one(pooled(places)), negatives=kind(config, places))

    def note(config, places):
        size, drawn = places.examples, kind(config, places)
        needs = crd_bytes(drawn, size=size, batch=config.batch_size)
        bank, step = (needs[part] / 2**20 for part in ("bank", "step"))
        return f"{name}: {bank:.1f} MiB for the memory bank, {step:.1f} MiB in a step"

    return Beside(crd, pooled, 0.8, make, note=note, name=name)


def _overhaul(config, places):
    norms = [places.norms.get(hint, hint) for _, hint in stages(places)]
    return overhaul(before_relu(places), norms)


def _class_attention(config, places):
    heads = _classifier(places.student), _classifier(places.teacher)
    return class_attention(_one(last_maps(places)), heads)


def _tinybert(config, places):
    hidden = stages(places)
    return tinybert(hidden, _inside(places, hidden, "scores"))


def _minilm(config, places):
    relations = last_relations(places)
    widths = [
        math.prod(layers[path].shape[2:])
        for layers, path in zip((places.student, places.teacher), relations[0])
    ]
    # 48 heads between widths of 384 and 768, as published.
    return minilm(relations, heads=max(1, math.gcd(*widths) // 8))


def _reused(config, places):
    return simkd(_one(last_maps(places)), _classifier(places.teacher))


def _channels(config, places):
    return channel_wise(last_stage(places), regressor=regressors.fit)


SOFT = Beside(soft_targets, outputs, Falling(4.0, 1.0), _softened(soft_targets, 3.0))
FITNETS = BeforeTask(fitnets, middle, after=SOFT, part=2)
HINTS_THEN_TASK = BeforeTask(fitnets, middle, part=2)
FITNETS_JOINTLY = Beside(
    fitnets, middle_stage, 100.0, _hints_jointly, name="fitnets_jointly"
)
KD = Beside(kd, outputs, 0.9, _softened(kd, 4.0), task_weight=0.1)
STANDARDIZED_KD = Beside(standardized_kd, outputs, 9.0, _softened(standardized_kd, 2.0))
DKD = Beside(
    decoupled_kd,
    outputs,
    Grown(1.0),
    lambda config, places: decoupled_kd(temperature=_or(config.temperature, 4.0)),
)
DIST = Beside(
    dist,
    outputs,
    1.0,
    lambda config, places: dist(temperature=_or(config.temperature, 1.0)),
)
AT = Beside(attention_transfer, stages, 1000.0)
FSP = BeforeTask(fsp, first_and_stages, _flows)
CRD = _contrastive("crd", AnchorNegatives)
CRD_SHARED = _contrastive("crd_shared", SharedNegatives)
CRD_IN_BATCH = _contrastive("crd_in_batch", lambda number: BatchNegatives())
REVIEW = Beside(review, stages_and_pooled, Grown(5.0))
SP = Beside(similarity_preserving, last_stage, 3000.0)
RKD = Beside(relational, pooled, 1.0)
PKT = Beside(probability_transfer, pooled, 30000.0)
VID = Beside(variational, stages, 1.0)
NST = Beside(selectivity, stages, 50.0)
AB = BeforeTask(activation_boundary, before_relu)
FT = Beside(factor_transfer, last_stage, 200.0)
CC = Beside(correlation_congruence, pooled, 0.02)
OFD = Beside(overhaul, before_relu, 1e-3, _overhaul)
SIMKD = Alone(simkd, last_maps, _reused)
CAT_KD = Beside(class_attention, last_maps, 400.0, _class_attention)
MGD = Beside(masked_generation, last_stage, 7e-5)
TINYBERT = BeforeTask(tinybert, hidden_and_scores, _tinybert, SOFT, part=2)
MINILM = BeforeTask(minilm, last_relations, _minilm, part=2)
PKD = Beside(patient, but_last, 250.0)  # 500 in all: a plain network has two such ends
COSINE = Beside(cosine, last_stage, 1.0)
CWD = Beside(channel_wise, last_stage, 5.0, _channels)
