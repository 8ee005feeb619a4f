"""Recipes: the published way to train with each method, as phases of a run.

A recipe says where its method attaches to two networks, with which weight, in which
stages. It sees the shapes of layers, never data.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import optax

from hintjax import pairing, regressors
from hintjax._checks import message
from hintjax.config import Config
from hintjax.losses import channel_loss
from hintjax.method import Method, Pairs, Weight, objective, task, weighted
from hintjax.methods import (
    AnchorNegatives,
    BatchNegatives,
    SharedNegatives,
    activation_boundary,
    attention_transfer,
    class_attention,
    correlation_congruence,
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
    overhaul,
    probability_transfer,
    relational,
    review,
    selectivity,
    similarity_preserving,
    simkd,
    soft_targets,
    standardized_kd,
    variational,
    warm_up,
)

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
        examples: in the training set.
    """

    student: Layers
    teacher: Layers
    pairs: tuple[tuple[str, str], ...] = ()
    preactivations: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    norms: Mapping[str, str] = {}
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


# (config, places, steps in an epoch) -> the phases of a run.
Recipe = Callable[[Config, Places, int], Sequence[Step]]
Make = Callable[[Config, Places], Method]


# Where methods attach


def middle(places: Places) -> Pairs:
    """The pair in the middle of both networks (FitNets)."""
    return places.pairs or pairing.suggest_pairs(places.student, places.teacher)


def stages(places: Places) -> Pairs:
    """The ends of the stages: f1 to f3 of the CRD benchmark."""
    return places.pairs or pairing.stage_pairs(places.student, places.teacher)


def last_stage(places: Places) -> Pairs:
    """The end of the last stage: f3 of the CRD benchmark."""
    return stages(places)[-1:]


def middle_stage(places: Places) -> Pairs:
    """The end of the middle stage: f2 of the CRD benchmark."""
    ends = stages(places)
    return ends[(len(ends) - 1) // 2 :][:1]


def first_and_stages(places: Places) -> Pairs:
    """The first layers, and the ends of the stages: f0 to f3 of the CRD benchmark."""
    if places.pairs:
        return places.pairs
    first = pairing.first_pair(places.student, places.teacher)
    return tuple(dict.fromkeys((first, *stages(places))))


def before_relu(places: Places) -> Pairs:
    """The ends of the stages before their ReLU, which the models have to know."""
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


def pooled(places: Places) -> Pairs:
    """The pooled vectors, which the classifiers are given: f4 of the CRD benchmark."""
    if places.pairs:
        return places.pairs
    return ((_pool(places.student), _pool(places.teacher)),)


def stages_and_pooled(places: Places) -> Pairs:
    """ReviewKD's: the stages, the teacher's before their ReLU, and the pooled vectors."""
    if places.pairs:
        return places.pairs
    before = places.preactivations[1]
    ends = ((guided, before.get(hint, hint)) for guided, hint in stages(places))
    return (*ends, *pooled(places))


def last_maps(places: Places) -> Pairs:
    """What is pooled: the last maps, which the classifiers see the mean of."""
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


def beside(
    name: str,
    make: Make,
    weight: float | Callable[[Config, int], Weight],
    task_weight: float = 1.0,
    note: Callable[[Config, Places], str] = lambda config, places: "",
) -> Recipe:
    """The recipe of a method beside the task, after its `prepare` if it has one.

    Args:
        name: of the term and of the phase.
        make: the method.
        weight: its published weight, or `(config, steps in an epoch) -> schedule`.
        task_weight: of the task.
        note: see `Step`.

    Returns:
        The recipe; `config.weight`, `config.task_weight` and `config.kd_weight` (KD as
        a third term) override the published weights.
    """

    def recipe(config, places, per_epoch):
        usual = weight(config, per_epoch) if callable(weight) else weight
        terms = {
            "task": weighted(cross_entropy(), _or(config.task_weight, task_weight)),
            name: weighted(make(config, places), _or(config.weight, usual)),
        }
        if config.kd_weight:
            term = kd(_or(config.temperature, 4.0))
            terms["logits"] = weighted(term, config.kd_weight)
        method = objective(**terms)
        told = note(config, places)
        if method.prepare is None:
            return [Step(name, method, config.epochs, note=told)]
        first = _share(config, 9)
        rest = config.epochs - first
        return [
            Step(f"before {name}", method.prepare, first, hints_only=True),
            Step(name, method, rest, carry=True, note=told),
        ]

    return recipe


def before_task(
    name: str,
    make: Make,
    after: Callable[..., Sequence[Step]] = backprop,
    part: int = 9,
) -> Recipe:
    """The recipe of a hint stage with the method alone, then another recipe.

    Args:
        name: of the term and of the phase.
        make: the method.
        after: the recipe that follows, `(config, places, per_epoch, epochs)`.
        part: the hint stage has this part of all epochs, unless the config says
            otherwise; 30 of 270 in the CRD benchmark.

    Returns:
        The recipe.
    """

    def recipe(config, places, per_epoch):
        first = _share(config, part)
        method = objective(**{name: make(config, places)})
        hint = Step(name, method, first, hints_only=True)
        return [hint, *after(config, places, per_epoch, config.epochs - first)]

    return recipe


def alone(name: str, make: Make) -> Recipe:
    """The recipe of a method without the task."""

    def recipe(config, places, per_epoch):
        return [Step(name, objective(**{name: make(config, places)}), config.epochs)]

    return recipe


def second_stage(
    config: Config, places: Places, per_epoch: int, epochs: int | None = None
) -> list[Step]:
    """FitNets' second stage; alone, the KD of FitNets' paper."""
    epochs = epochs or config.epochs
    # Lambda decays from 4 to 1, over all of the stage.
    decay = lambda_decay(4.0, 1.0, 0, epochs, per_epoch)
    terms = {
        "task": weighted(cross_entropy(), _or(config.task_weight, 1.0)),
        "kd": weighted(soft_targets(_or(config.temperature, 3.0)), decay),
    }
    rates = {}
    if config.hinted_rate != 1:
        rates = {guided: config.hinted_rate for guided, _ in middle(places)[-1:]}
    return [Step("distillation", objective(**terms), epochs, rates=rates)]


def _share(config, part):
    """Epochs of the stage before."""
    first = config.hint_epochs or max(1, config.epochs // part)
    if first >= config.epochs:
        wanted = f"{config.method}: epochs >= 2, one for each stage"
        raise ValueError(message("config", wanted, f"{config.epochs}"))
    return first


def _or(value: float | None, usual: Weight) -> Weight:
    return usual if value is None else value


# The recipes of the methods, in the order of the README


def _hints(config, places):
    return fitnets(middle(places))


def _hints_jointly(config, places):
    sizing = functools.partial(regressors.conv, batch_norm=True, activation=nn.relu)
    return fitnets(middle_stage(places), regressor=sizing)


def _flows(config, places):
    pairs = first_and_stages(places)
    equal = all(
        places.student[guided].shape[-1] == places.teacher[hint].shape[-1]
        for guided, hint in pairs
        if guided in places.student and hint in places.teacher
    )
    return fsp(flows(pairs), regressor=None if equal else regressors.linear)


def _contrastive(name, negatives):
    def number(config, places):
        return min(config.negatives, places.examples)

    def make(config, places):
        kind = negatives(number(config, places))
        return crd(_one(pooled(places)), negatives=kind)

    def note(config, places):
        size, kind = places.examples, negatives(number(config, places))
        needs = crd_bytes(kind, size=size, batch=config.batch_size)
        bank, step = (needs[part] / 2**20 for part in ("bank", "step"))
        return f"CRD: {bank:.1f} MiB for the memory bank, {step:.1f} MiB in a step"

    return beside(name, make, 0.8, note=note)


def _grown(weight):
    """As published over 20 of 240 epochs: over a twelfth of all."""

    def schedule(config, per_epoch):
        return warm_up(weight, max(1, config.epochs // 12), per_epoch)

    return schedule


def _overhaul(config, places):
    norms = [places.norms.get(hint, hint) for _, hint in stages(places)]
    return overhaul(before_relu(places), norms)


def _class_attention(config, places):
    heads = _classifier(places.student), _classifier(places.teacher)
    return class_attention(_one(last_maps(places)), heads)


fitnets_two_stages = before_task("hint", _hints, second_stage, part=2)
hints_then_task = before_task("hint", _hints, part=2)
fitnets_jointly = beside("hint", _hints_jointly, 100.0)
knowledge = beside(
    "kd", lambda config, places: kd(_or(config.temperature, 4.0)), 0.9, 0.1
)
attention = beside(
    "at", lambda config, places: attention_transfer(stages(places)), 1000.0
)
flow = before_task("fsp", _flows)
contrastive = _contrastive("crd", AnchorNegatives)
contrastive_shared = _contrastive("crd_shared", SharedNegatives)
contrastive_in_batch = _contrastive("crd_in_batch", lambda number: BatchNegatives())
knowledge_review = beside(
    "review", lambda config, places: review(stages_and_pooled(places)), _grown(5.0)
)
similarity = beside(
    "sp", lambda config, places: similarity_preserving(last_stage(places)), 3000.0
)
relations = beside("rkd", lambda config, places: relational(pooled(places)), 1.0)
probabilities = beside(
    "pkt", lambda config, places: probability_transfer(pooled(places)), 30000.0
)
variations = beside("vid", lambda config, places: variational(stages(places)), 1.0)
selective = beside("nst", lambda config, places: selectivity(stages(places)), 50.0)
boundaries = before_task(
    "ab", lambda config, places: activation_boundary(before_relu(places))
)
factors = beside(
    "ft", lambda config, places: factor_transfer(last_stage(places)), 200.0
)
correlations = beside(
    "cc", lambda config, places: correlation_congruence(pooled(places)), 0.02
)
overhauled = beside("ofd", _overhaul, 1e-3)
decoupled = beside(
    "dkd",
    lambda config, places: decoupled_kd(temperature=_or(config.temperature, 4.0)),
    _grown(1.0),
)
correlated = beside(
    "dist",
    lambda config, places: dist(temperature=_or(config.temperature, 1.0)),
    1.0,
)
standardized = beside(
    "std_kd",
    lambda config, places: standardized_kd(_or(config.temperature, 2.0)),
    9.0,
)
reused = alone(
    "simkd",
    lambda config, places: simkd(_one(last_maps(places)), _classifier(places.teacher)),
)
attended_classes = beside("catkd", _class_attention, 400.0)
generated = beside(
    "mgd", lambda config, places: masked_generation(last_stage(places)), 7e-5
)
channels = beside(
    "cwd",
    lambda config, places: fitnets(last_stage(places), loss=channel_loss),
    5.0,
)
