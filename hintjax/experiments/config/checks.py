"""Refuses a config that would fail or mislead later."""

import re

from hintjax._checks import (
    Refusal,
    described,
    integer,
    message,
    not_negative,
    positive,
    positive_int,
    scalar,
)
from hintjax.experiments.config.options import Config
from hintjax.experiments.config.settings import (
    layer_rates,
    own_settings,
    parse_pair,
    with_settings,
)
from hintjax.experiments.tasks import TASKS
from hintjax.experiments.teacher import teacher_of


def check(config: Config) -> Config:
    """Refuses a config that would fail or mislead later.

    Raises:
        Refusal: naming the first field that is wrong.
    """
    for name in ("temperature", "checkpoint_seconds"):
        if getattr(config, name) is not None:
            positive("config", **{name: getattr(config, name)})
    if config.spike_factor is not None:
        factor = config.spike_factor
        scalar("config", "to be > 1", lambda x: x > 1, spike_factor=factor)
    for rate in (config.learning_rate, *config.rates):
        positive("config", learning_rate=rate)
    for name in (
        *("epochs", "teacher_epochs", "batch_size", "accumulate", "seeds"),
        *("evaluate_every", "checkpoint_every", "negatives", "fsdp", "balance_every"),
    ):
        positive_int("config", **{name: getattr(config, name)})
    for name in ("limit", "labels", "size", "views", "patience", "dispatch", "devices"):
        if getattr(config, name) is not None:
            positive_int("config", **{name: getattr(config, name)})
    for name in (
        *("task_weight", "weight", "kd_weight", "weight_decay", "hinted_rate", "pad"),
        "teacher_at_least",
    ):
        value = getattr(config, name)
        if value is not None:
            not_negative("config", **{name: value})
    integer("config", 0, seed=config.seed)
    _check_task(config)
    models = {"student": config.student}
    teacher = teacher_of(config.teacher)
    if teacher.factory is not None:
        models["teacher"] = teacher.factory
    elif config.weights is not None:
        wanted = "a factory as teacher, which makes the network of the weights"
        raise Refusal(message("config", wanted, described(config.teacher)))
    for name, model in models.items():
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", model):
            wanted = f"{name} as package.module:factory"
            do = "For instance hintjax.models:resnet20."
            raise Refusal(message("config", wanted, described(model), do))
    if config.balance is not None:
        share = config.balance
        scalar("config", "to be between 0 and 1", lambda x: 0 < x < 1, balance=share)
        if config.weight == 0 or config.task_weight == 0:
            do = "Leave out --weight 0 and --task-weight 0, or --balance."
            wanted = "a method and a task with weights > 0, to balance them"
            raise Refusal(message("config", wanted, "a weight of 0", do))
    if config.weight == 0 and config.task_weight == 0:
        got = "weight 0 and task_weight 0"
        raise Refusal(message("config", "a loss with a weight > 0", got))
    if config.hint_epochs is not None and not 0 < config.hint_epochs < config.epochs:
        wanted = f"hint_epochs between 1 and epochs - 1 = {config.epochs - 1}"
        raise Refusal(message("config", wanted, f"{config.hint_epochs}"))
    for pair in config.pairs:
        parse_pair(pair)
    layer_rates(config)
    _check_settings(config)
    return config


def _check_settings(config: Config) -> None:
    """Refuses settings of methods that are not compared, and values out of range."""
    for method, own in own_settings(config).items():
        if method not in config.compare:
            wanted = f"settings of the methods in compare, {list(config.compare)}"
            do = "For a single method, use its options, such as --weight."
            raise Refusal(message("config", wanted, described(method), do))
        check(with_settings(config, own))


def _check_task(config: Config) -> None:
    """Refuses options that have no meaning for the task."""
    task = TASKS[config.task]
    if config.labels is not None and task.targets is not None:
        wanted = f"no labels option for {config.task}, which needs every label"
        raise Refusal(message("config", wanted, f"{config.labels}"))
    if config.temperature is not None and not task.tempered:
        wanted = f"no temperature for {config.task}, whose KD has none"
        raise Refusal(message("config", wanted, f"{config.temperature}"))
    if task.targets is None or not task.targets.positions:
        return
    for name in ("size", "pad", "flip"):
        if getattr(config, name):
            wanted = f"no {name} for {config.task}, as labels stay where they are"
            raise Refusal(message("config", wanted, f"{getattr(config, name)}"))
