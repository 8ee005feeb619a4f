"""The plan of a config: the recipe of its method, or the arms of its comparison."""

from collections.abc import Sequence
from typing import NamedTuple

from hintjax._checks import Refusal, message, nearest
from hintjax.experiments import attachment, recipes
from hintjax.experiments import config as configs
from hintjax.experiments.comparison import Arm
from hintjax.experiments.config import Config
from hintjax.experiments.methods_table import CLASSES_ONLY, RECIPES
from hintjax.experiments.recipes import Recipe, With, backprop

# `distill` compares these arms by default. FitNets was invented for students such as
# the plain one. The He rows and the untrained teacher show how much of a gain comes
# only from a student that trains at all.
_HE = "hintjax.models:plain_thin_he"


class Plan(NamedTuple):
    """The runs that a config asks for.

    Attributes:
        recipes: recipes of these runs.
        arms: arms of a comparison; none for a single run.
    """

    recipes: Sequence[Recipe]
    arms: Sequence[Arm] = ()


def planned(config: Config) -> Plan:
    """The recipes of the methods that a config names, alone or as a comparison."""
    if config.method is not None:
        return Plan([recipe_of(config.method, config.task)])
    arms = _named_arms(config) if config.compare else _default_arms(config)
    return Plan([arm.recipe for arm in arms], arms)


def recipe_of(name: str, task: str) -> Recipe:
    """The recipe of a method's name, for a task."""
    if name not in RECIPES:
        do = f"Nearest: {', '.join(nearest(name, RECIPES))}."
        raise Refusal(message("distill", "a method", repr(name), do))
    if name in CLASSES_ONLY and task != Config.task:
        do = f"{name} needs class labels, or the softmax of a classifier."
        raise Refusal(message("distill", f"a method for {task}", repr(name), do))
    return RECIPES[name]


def _named_arms(config: Config) -> list[Arm]:
    """The arms of --compare; methods that compare only outputs are baselines."""
    rates = config.rates or (config.learning_rate,)
    arms, settings = [], configs.own_settings(config)
    for name in config.compare:
        recipe = recipe_of(name, config.task)
        own = settings.get(name, {})
        tried = (own.pop("learning_rate"),) if "learning_rate" in own else rates
        used = With(recipe, tuple(own.items())) if own else recipe
        arms.append(
            Arm(name, used, tried, config.student, baseline=not attaches(recipe))
        )
    return arms


def attaches(recipe: Recipe) -> bool:
    """Whether a recipe attaches to hidden layers, or compares only outputs."""
    return recipe is not backprop and recipe.where is not attachment.outputs


def _default_arms(config: Config) -> list[Arm]:
    """FitNets, its controls, KD and AT, at rates that were chosen on the digits."""

    def arm(
        name: str,
        recipe: Recipe,
        rate: float = 1e-3,
        initial: str = config.student,
        **more: bool,
    ) -> Arm:
        return Arm(name, recipe, config.rates or (rate,), initial, **more)

    hints = {"recipe": recipes.FITNETS, "baseline": False}
    maps = recipes.AT._replace(where=attachment.middle)  # the pair of FitNets
    arms = [
        arm("backprop", backprop),
        arm("KD", recipes.SOFT),
        arm("AT", maps),
        arm("FitNets", **hints),
        arm("FitNets, untrained hints", **hints, untrained=True),
        arm("hints, then the task", recipes.HINTS_THEN_TASK, baseline=False),
    ]
    if config.student == Config.student:
        arms += [
            arm("backprop, He", backprop, initial=_HE),
            arm("KD, He", recipes.SOFT, initial=_HE),
            arm("AT, He", maps, 3e-3, _HE),
            arm("FitNets, He", **hints, initial=_HE),
        ]
    return arms
