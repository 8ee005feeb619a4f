"""Recipes: the published way to train with each method, as phases of a run.

A recipe says where its method attaches to two networks (`attachment`), with which
weight, and in which stages. It reads the shapes of layers, never data.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintjax import regressors
from hintjax._checks import Refusal, message
from hintjax.data.images import UNLABELED
from hintjax.experiments.attachment import (
    Places,
    before_relu,
    but_last,
    classifier,
    first_and_stages,
    hidden_and_scores,
    inside,
    last_maps,
    last_relations,
    last_stage,
    middle,
    middle_stage,
    on_grids,
    one,
    outputs,
    pooled,
    stages,
    stages_and_pooled,
    without_class_tokens,
)
from hintjax.experiments.config import (
    Adjusted,
    Config,
    check,
    parse_pair,
    with_settings,
)
from hintjax.experiments.tasks import TASKS
from hintjax.losses import Standardization
from hintjax.losses.feature_standardization import hadamard_matrix
from hintjax.method import Method, Pairs
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
    dense_matching,
    dist,
    factor_transfer,
    fitnets,
    flows,
    fsp,
    hard_labels,
    kd,
    lambda_decay,
    masked_generation,
    minilm,
    orthogonal_projection,
    overhaul,
    patient,
    probability_transfer,
    queue_similarity,
    relational,
    review,
    selectivity,
    similarity_preserving,
    simkd,
    soft_targets,
    standardized_kd,
    tinybert,
    token_gram,
    variational,
    warm_up,
)
from hintjax.methods._negatives import Negatives
from hintjax.objective import Adjustable, Weight, Weighted, objective, weighted
from hintjax.sharding import shares
from hintjax.stages.balance import Balance


class PlannedPhase(NamedTuple):
    """One phase of a recipe: a method in a stage, for a share of the epochs.

    Attributes:
        name: name of the phase, in the metrics.
        method: method that is trained.
        epochs: length of the phase.
        source: everything from which `method` was made, besides the config, the
            networks and the mesh. Methods are closures, which cannot be compared. So
            equal sources say that two phases can share a compiled program.
        hints_only: whether it is a hint stage.
        carry: see `hintjax.training.Phase`.
        rates: see `distillation_stage`.
        note: text for the user, before the phase starts.
        balance: see `hintjax.training.Phase`.
    """

    name: str
    method: Method
    epochs: int
    source: Hashable
    hints_only: bool = False
    carry: bool = False
    rates: Mapping[str, float] = {}
    note: str = ""
    balance: Balance | None = None


# (config, places, steps in an epoch, epochs) -> the phases of a run.
Recipe = Callable[..., Sequence[PlannedPhase]]
Where = Callable[[Places], Pairs]
Make = Callable[[Config, Places], Method]


# The three ways to train

_EVERY_LABEL = (crd, decoupled_kd)  # methods that read the label of every example


def _task(config: Config, places: Places, weight: float = 1.0) -> Weighted:
    """The task with its weight; only examples with a label count.

    The loss of an example without a label is 0, so the weight makes the expected loss
    of a batch that of the examples with labels.
    """
    task = TASKS[config.task]
    if places.labels is None:
        return weighted(task.method(), weight)
    few = task._replace(ignore=(UNLABELED,)).method()
    return weighted(few, weight * places.examples / places.labels)


def _check_labels(name: str, places: Places, *, every: bool = False) -> None:
    """Raises if a method needs labels, or every label, and they are not there."""
    if places.labels is None or (places.labels and not every):
        return
    of = "all training examples" if every else "training examples"
    wanted = f"labels of {of}, which {name} needs"
    got = f"{places.labels} of {places.examples}" if places.labels else "none"
    do = "Methods such as fitnets, at, kd and dense_matching learn without labels."
    raise Refusal(message("distill", wanted, got, do))


def backprop(
    config: Config, places: Places, per_epoch: int, epochs: int | None = None
) -> list[PlannedPhase]:
    """The recipe of the task alone; also how a teacher is trained."""
    _check_labels("backprop", places)
    method = objective(task=_task(config, places))
    return [PlannedPhase("backprop", method, epochs or config.epochs, backprop)]


class Grown(NamedTuple):
    """A weight that grows over a twelfth of the epochs; 20 of 240 as published."""

    weight: float

    def __call__(self, epochs: int, per_epoch: int) -> Weight:
        """The schedule of the weight."""
        return warm_up(self.weight, max(1, epochs // 12), per_epoch)

    def __str__(self) -> str:
        return f"{self.weight:g}, grown"


class Falling(NamedTuple):
    """FitNets' lambda, which falls over all epochs of its stage."""

    first: float
    last: float

    def __call__(self, epochs: int, per_epoch: int) -> Weight:
        """The schedule of the weight."""
        return lambda_decay(self.first, self.last, 0, epochs, per_epoch)

    def __str__(self) -> str:
        return f"{self.first:g}, falling to {self.last:g}"


class Beside(NamedTuple):
    """The recipe of a method beside the task; `prepare` comes first, if there is one.

    `config.weight`, `config.task_weight` and `config.kd_weight` (KD as a third term)
    override the published weights.

    Attributes:
        method: function of `hintjax.methods`, whose name the term and the phase get.
        where: pairs of layers to which the method attaches.
        weight: published weight of the method.
        make: makes the method for a run; by default from the pairs alone.
        task_weight: published weight of the task.
        note: see `PlannedPhase`.
        name: name of the term and the phase, if it is not the method's.
    """

    method: Callable[..., Method]
    where: Where
    weight: float | Grown | Falling
    make: Make | None = None
    task_weight: float = 1.0
    note: Callable[[Config, Places], str] = lambda config, places: ""
    name: str = ""

    def __call__(
        self,
        config: Config,
        places: Places,
        per_epoch: int,
        epochs: int | None = None,
    ) -> list[PlannedPhase]:
        """The phases of the recipe."""
        epochs = epochs or config.epochs
        method = _made(self, config, places)
        before = 0 if method.prepare is None else _share(config, 9)
        rest = epochs - before
        usual = self.weight
        if isinstance(usual, Grown | Falling):
            usual = usual(rest, per_epoch)
        name = self.name or self.method.__name__
        terms = {name: weighted(method, _start(config, _or(config.weight, usual)))}
        if places.labels == 0:
            if config.task_weight:
                _check_labels("the task (--task-weight)", places)
        else:
            task_weight = self.task_weight
            if config.task_weight is not None:
                task_weight = config.task_weight
            terms = {"task": _task(config, places, task_weight), **terms}
        if config.kd_weight:
            usual = 4.0 if config.temperature is None else config.temperature
            term = TASKS[config.task].kd(usual)
            terms["logits"] = weighted(term, config.kd_weight)
        whole, note = objective(**terms), self.note(config, places)
        source = (self, rest)  # the schedule of the weight depends on both
        balance = _balance(config, name) if len(terms) > 1 else None
        phase = PlannedPhase(name, whole, epochs, source, note=note, balance=balance)
        if places.labels == 0 and not (whole.student.output or whole.student.params):
            phase = phase._replace(hints_only=True)
        if not before or whole.prepare is None:
            return [phase]
        first = f"before {name}"
        return [
            PlannedPhase(first, whole.prepare, before, source, hints_only=True),
            phase._replace(epochs=rest, carry=True),
        ]


class BeforeTask(NamedTuple):
    """The recipe of a hint stage with the method alone, then another recipe.

    Without labels the task cannot follow, and the hint stage has all epochs.

    Attributes:
        method: see `Beside`.
        where: see `Beside`.
        make: see `Beside`.
        after: recipe that follows and starts from the student of the hint stage.
        part: the hint stage has 1 / `part` of all epochs, unless the config says
            otherwise; 30 of 270 in the CRD benchmark.
    """

    method: Callable[..., Method]
    where: Where
    make: Make | None = None
    after: Recipe = backprop
    part: int = 9

    def __call__(
        self,
        config: Config,
        places: Places,
        per_epoch: int,
        epochs: int | None = None,
    ) -> list[PlannedPhase]:
        """The phases of the recipe."""
        name = self.method.__name__
        method = objective(**{name: _made(self, config, places)})
        source = (self.method, self.where, self.make)  # the same for every `after`
        if places.labels == 0 and (self.after is backprop or not places.same_outputs):
            whole = epochs or config.epochs
            note = f"{name}: there are no labels, so the hint stage has all epochs"
            return [
                PlannedPhase(name, method, whole, source, hints_only=True, note=note)
            ]
        before = _share(config, self.part)
        rates = {}
        if config.hinted_rate != 1:
            rates = {path: config.hinted_rate for path in method.student.hints}
        rest = (epochs or config.epochs) - before
        return [
            PlannedPhase(name, method, before, source, hints_only=True),
            *(
                phase._replace(rates=rates)
                for phase in self.after(config, places, per_epoch, rest)
            ),
        ]


def soft_or_task(
    config: Config, places: Places, per_epoch: int, epochs: int | None = None
) -> Sequence[PlannedPhase]:
    """The recipe of soft targets; of the task alone if the outputs differ in shape.

    A teacher of other classes has no targets for the student, but its hints help.
    """
    if places.same_outputs:
        return SOFT(config, places, per_epoch, epochs)
    (phase,) = backprop(config, places, per_epoch, epochs)
    note = "backprop: the teacher has other classes, so this stage has no soft targets"
    return [phase._replace(note=note)]


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

    def __call__(
        self,
        config: Config,
        places: Places,
        per_epoch: int,
        epochs: int | None = None,
    ) -> list[PlannedPhase]:
        """The phases of the recipe."""
        name = self.method.__name__
        method = objective(**{name: _made(self, config, places)})
        return [PlannedPhase(name, method, epochs or config.epochs, self)]


class With(NamedTuple):
    """A recipe with settings of its own, in place of those of the config.

    Attributes:
        recipe: the recipe.
        settings: names and values of fields of a config; see `config.SETTINGS`.
        adjusted: whether the weight is a value of the state; see `config.Adjusted`.
    """

    recipe: Recipe
    settings: tuple[tuple[str, Any], ...] = ()
    adjusted: bool = False

    def __call__(
        self,
        config: Config,
        places: Places,
        per_epoch: int,
        epochs: int | None = None,
    ) -> list[PlannedPhase]:
        """The phases of the recipe."""
        config = check(with_settings(config, dict(self.settings)))
        if self.adjusted:
            config = Adjusted(**vars(config))
        planned = self.recipe(config, self.places(places), per_epoch, epochs)
        own = self.settings, self.adjusted
        return [phase._replace(source=(phase.source, *own)) for phase in planned]

    def places(self, places: Places) -> Places:
        """The places with the pairs of these settings, if there are any."""
        pairs = dict(self.settings).get("pairs")
        if pairs is None:
            return places
        return places._replace(pairs=tuple(map(parse_pair, pairs)))


def _made(
    recipe: "Beside | BeforeTask | Alone", config: Config, places: Places
) -> Method:
    """The method of a recipe, attached to both networks."""
    if recipe.method in _EVERY_LABEL:
        _check_labels(recipe.method.__name__, places, every=True)
    if recipe.make is None:
        method = recipe.method(recipe.where(places))
    else:
        method = recipe.make(config, places)
    if places.labels is not None:
        method = _unlabeled(method)
    return on_grids(method, places)


def _unlabeled(method: Method) -> Method:
    """The method, which says that examples without a label are right."""
    if method.prepare is not None:
        method = method._replace(prepare=_unlabeled(method.prepare))
    return method._replace(ignored=(*method.ignored, UNLABELED))


def _share(config: Config, part: int) -> int:
    """The epochs of the hint stage."""
    first = config.hint_epochs or max(1, config.epochs // part)
    if first >= config.epochs:
        wanted = f"at least 2 epochs of {config.method}, one for each stage"
        raise Refusal(message("config", wanted, f"{config.epochs}"))
    return first


def _or(value: float | None, usual: Weight) -> Weight:
    """The value of the config, or the published value."""
    return usual if value is None else value


def _start(config: Config, weight: Weight) -> Weight:
    """A weight, in the state if it changes there; a schedule is a factor."""
    fixed = config.balance is None and not isinstance(config, Adjusted)
    if fixed or isinstance(weight, Adjustable):
        return weight
    return Adjustable(1.0, weight) if callable(weight) else Adjustable(weight)


def _balance(config: Config, name: str) -> Balance | None:
    """The share of a method beside the task, if the config balances it."""
    if config.balance is None:
        return None
    return Balance({name: config.balance}, config.balance_every)


# The recipes of the published methods


def _softened(method: Callable[..., Method], temperature: float) -> Make:
    """A method of outputs, at the temperature of the config or the published one."""

    def make(config: Config, places: Places) -> Method:
        return method(temperature=_or(config.temperature, temperature))

    return make


def _kd(config: Config, places: Places) -> Method:
    usual = 4.0 if config.temperature is None else config.temperature
    return TASKS[config.task].kd(usual)


def _soft_targets(config: Config, places: Places) -> Method:
    usual = 3.0 if config.temperature is None else config.temperature
    return TASKS[config.task].soft(usual)


def _hard(config: Config, places: Places) -> Method:
    return hard_labels()


def _hints_jointly(config: Config, places: Places) -> Method:
    sizing = functools.partial(regressors.conv, batch_norm=True, activation=nn.relu)
    return fitnets(middle_stage(places), regressor=sizing)


def _flows(config: Config, places: Places) -> Method:
    pairs = first_and_stages(places)
    known = [
        (places.student[guided].shape[-1], places.teacher[hint].shape[-1])
        for guided, hint in pairs
        if guided in places.student and hint in places.teacher
    ]
    unequal = any(ours != theirs for ours, theirs in known)
    return fsp(flows(pairs), regressor=regressors.linear if unequal else None)


def _contrastive(name: str, negatives: Callable[[int], Negatives]) -> Beside:
    def kind(config: Config, places: Places) -> Negatives:
        return negatives(min(config.negatives, places.examples))

    def make(config: Config, places: Places) -> Method:
        drawn = kind(config, places)
        mesh = None if isinstance(drawn, BatchNegatives) else places.mesh
        return crd(one(pooled(places)), negatives=drawn, mesh=mesh)

    def note(config: Config, places: Places) -> str:
        size, drawn = places.examples, kind(config, places)
        needs = crd_bytes(drawn, size=size, batch=config.batch_size)
        bank, step = (needs[part] / 2**20 for part in ("bank", "step"))
        if places.mesh is None:
            needed = f"{bank:.1f} MiB for the memory bank, {step:.1f} MiB in a step"
        else:
            bank /= shares(places.mesh)
            needed = f"{bank:.1f} MiB for the memory bank on each device"
        return f"{name}: {needed}"

    return Beside(crd, pooled, 0.8, make, note=note, name=name)


def _overhaul(config: Config, places: Places) -> Method:
    norms = [places.norms.get(hint, hint) for _, hint in stages(places)]
    return overhaul(before_relu(places), norms)


def _class_attention(config: Config, places: Places) -> Method:
    heads = classifier(places.student), classifier(places.teacher)
    return class_attention(one(last_maps(places)), heads)


def _tinybert(config: Config, places: Places) -> Method:
    hidden = stages(places)
    return tinybert(hidden, inside(places, hidden, "scores"))


def _minilm(config: Config, places: Places) -> Method:
    relations = last_relations(places)
    widths = [
        math.prod(layers[path].shape[2:])
        for layers, path in zip(
            (places.student, places.teacher), relations[0], strict=True
        )
    ]
    # 48 heads between widths of 384 and 768, as published.
    return minilm(relations, heads=max(1, math.gcd(*widths) // 8))


def _reused(config: Config, places: Places) -> Method:
    return simkd(one(last_maps(places)), classifier(places.teacher))


def _channels(config: Config, places: Places) -> Method:
    return channel_wise(last_stage(places), regressor=regressors.fit)


def _dense(config: Config, places: Places) -> Method:
    return without_class_tokens(dense_matching(last_stage(places)), places)


def _phi_s(config: Config, places: Places) -> Method:
    pairs = last_stage(places)

    def of(hint: str) -> Standardization:
        if hint in places.standardizations:
            return places.standardizations[hint]
        channels = places.teacher[hint].shape[-1]
        jax.eval_shape(lambda: hadamard_matrix(channels))  # raises
        eye = jnp.eye(channels)
        return Standardization(jnp.zeros(channels), eye, eye)

    transforms = [of(hint) for _, hint in pairs]
    return without_class_tokens(
        dense_matching(pairs, standardization=transforms), places
    )


def _queue(config: Config, places: Places) -> Method:
    return queue_similarity(one(pooled(places)))


SOFT = Beside(soft_targets, outputs, Falling(4.0, 1.0), _soft_targets)
FITNETS = BeforeTask(fitnets, middle, after=soft_or_task, part=2)
HINTS_THEN_TASK = BeforeTask(fitnets, middle, part=2)
FITNETS_JOINTLY = Beside(
    fitnets, middle_stage, 100.0, _hints_jointly, name="fitnets_jointly"
)
KD = Beside(kd, outputs, 0.9, _kd, task_weight=0.1)
STANDARDIZED_KD = Beside(standardized_kd, outputs, 9.0, _softened(standardized_kd, 2.0))
DKD = Beside(decoupled_kd, outputs, Grown(1.0), _softened(decoupled_kd, 4.0))
HARD_LABELS = Beside(hard_labels, outputs, 0.5, _hard, task_weight=0.5)
DIST = Beside(dist, outputs, 1.0, _softened(dist, 1.0))
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
TINYBERT = BeforeTask(tinybert, hidden_and_scores, _tinybert, soft_or_task, part=2)
MINILM = BeforeTask(minilm, last_relations, _minilm, part=2)
PKD = Beside(patient, but_last, 250.0)  # 500 in all: a plain network has two such ends
COSINE = Beside(cosine, last_stage, 1.0)
GRAM = Beside(token_gram, stages, 1.0)
DENSE = BeforeTask(dense_matching, last_stage, _dense, part=2)
PHI_S = BeforeTask(dense_matching, last_stage, _phi_s, part=2)
QUEUE = BeforeTask(queue_similarity, pooled, _queue, part=2)
VKD = BeforeTask(orthogonal_projection, pooled, part=2)
CWD = Beside(channel_wise, last_stage, 5.0, _channels)
