"""Groups: candidates of a method that share compiled programs.

Learning rate and weight are numbers of a state, so candidates that differ in nothing
else form one group. Every other setting is built into a program.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hintjax.data import steps_per_epoch
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.phases import check
from hintjax.experiments.plan import attaches, recipe_of
from hintjax.experiments.recipes import With
from hintjax.experiments.setting import Setting
from hintjax.experiments.tuning.candidates import Candidate, Rung, rungs

IN_STATE = ("weight", "learning_rate")  # settings that a state holds


class Group(NamedTuple):
    """Candidates of one method that share compiled programs.

    Attributes:
        recipe: recipe with the settings that they share.
        candidates: learning rate and weight by the number of the candidate.
        epochs: epochs of each phase.
    """

    recipe: With
    candidates: Mapping[int, Candidate]
    epochs: Sequence[int]

    def end(self, rung: Rung) -> int:
        """The epoch at the end of a rung, which is in the last phase."""
        *before, last = self.epochs
        return sum(before) + rung.epochs(last)


class Plan(NamedTuple):
    """The candidates of one method, and how long they train.

    Attributes:
        groups: groups of the candidates.
        rungs: rungs of successive halving, over all groups.
        per_epoch: steps in an epoch.
    """

    groups: Sequence[Group]
    rungs: Sequence[Rung]
    per_epoch: int

    def epochs(self) -> int:
        """The epochs of all candidates, if all have the phases of the first group."""
        ends = [0, *(self.groups[0].end(rung) for rung in self.rungs)]
        return sum(
            rung.candidates * (end - start)
            for rung, start, end in zip(self.rungs, ends, ends[1:], strict=False)
        )


def plan_of(
    setting: Setting, name: str, tried: Sequence[Candidate], most: int | None = None
) -> Plan:
    """The plan of a method; raises for settings that cannot work.

    Args:
        setting: setting of the run.
        name: name of the method.
        tried: the candidates.
        most: largest number of rungs.
    """
    groups = _groups(setting, name, tried)
    least = min(group.epochs[-1] for group in groups)
    per_epoch = steps_per_epoch(setting.dataset.train.n, setting.config.batch_size)
    return Plan(groups, rungs(len(tried), least, most), per_epoch)


def _groups(setting: Setting, name: str, tried: Sequence[Candidate]) -> list[Group]:
    """The candidates of a method, by all settings that change the program."""
    config, recipe = setting.config, recipe_of(name, setting.config.task)
    own = configs.own_settings(config).get(name, {})
    found: dict[With, dict[int, Candidate]] = {}
    for number, candidate in enumerate(tried):
        whole = {"learning_rate": config.learning_rate, **own, **candidate}
        shared = {k: v for k, v in whole.items() if k not in IN_STATE}
        moving = {k: v for k, v in whole.items() if k in IN_STATE}
        if "weight" in moving:
            shared["weight"] = 1.0  # until the state gets another
        key = With(recipe, tuple(shared.items()), adjustable="weight" in moving)
        found.setdefault(key, {})[number] = moving
    return [
        Group(key, some, [phase.epochs for phase in check(setting, key)])
        for key, some in found.items()
    ]


def settings_read(setting: Setting, name: str, config: Config) -> set[str]:
    """The names of the settings that a method reads; found by planning its phases.

    Args:
        setting: setting of the run.
        name: name of the method.
        config: config of the run, with values of all settings in question.
    """
    recipe = recipe_of(name, config.task)
    read: set[str] = set()

    class Watched(Config):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    watched = Watched(**vars(config))
    read.clear()  # of the names that were read while it was made
    recipe(watched, setting.places, 1)
    found = read & {*configs.SETTINGS} | {"learning_rate"}
    return found | {"pairs"} if attaches(recipe) else found - {"pairs"}
