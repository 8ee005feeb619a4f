"""The kinds of recipes: a method beside the task, before the task, or alone.

A recipe says where its method attaches to two networks (`attachment`), with which
weight, and in which stages. It reads the shapes of layers, never data.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from hintjax._checks import Refusal, message
from hintjax.data.images import UNLABELED
from hintjax.experiments.attachment import (
    Places,
    on_grids,
)
from hintjax.experiments.config import (
    Config,
    check,
    parse_pair,
    with_settings,
)
from hintjax.experiments.tasks import TASKS
from hintjax.method import Method, Pairs
from hintjax.methods import (
    crd,
    decoupled_kd,
    lambda_decay,
    warm_up,
)
from hintjax.objective import Adjustable, Weight, Weighted, objective, weighted
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
        weight = _start(config, places, _or(config.weight, usual))
        terms = {name: weighted(method, weight)}
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
        adjustable: whether the weight is a value of the state; see `Places`.
    """

    recipe: Recipe
    settings: tuple[tuple[str, Any], ...] = ()
    adjustable: bool = False

    def __call__(
        self,
        config: Config,
        places: Places,
        per_epoch: int,
        epochs: int | None = None,
    ) -> list[PlannedPhase]:
        """The phases of the recipe."""
        config = check(with_settings(config, dict(self.settings)))
        if self.adjustable:
            places = places._replace(adjustable=True)
        planned = self.recipe(config, self.places(places), per_epoch, epochs)
        own = self.settings, self.adjustable
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


def _start(config: Config, places: Places, weight: Weight) -> Weight:
    """A weight, in the state if it changes there; a schedule is a factor."""
    changes = places.adjustable or config.balance is not None
    if not changes or isinstance(weight, Adjustable):
        return weight
    return Adjustable(1.0, weight) if callable(weight) else Adjustable(weight)


def _balance(config: Config, name: str) -> Balance | None:
    """The share of a method beside the task, if the config balances it."""
    if config.balance is None:
        return None
    return Balance({name: config.balance}, config.balance_every)
