"""The configuration of a run: a frozen dataclass, in and out of YAML."""

import dataclasses
import itertools
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hintjax._checks import (
    LARGEST_FLOAT,
    FileRefusal,
    Refusal,
    WrongType,
    described,
    integer,
    message,
    nearest,
    not_negative,
    positive,
    positive_int,
    scalar,
)
from hintjax.training.run_directory import write_text

FILE = "config.yaml"
# What PyYAML's conversions raise for what they cannot convert, beside its own errors.
_NO_YAML = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is made of; every run directory holds its own as config.yaml."""

    method: str | None = None
    """How to distil; without it, methods are compared."""
    compare: tuple[str, ...] = ()
    """The methods to compare; by default FitNets with its controls, KD and AT."""
    dataset: str = "digits"
    """digits, a file .npz with image and label, or a TensorFlow Datasets name."""
    data_dir: str | None = None
    """Where prepared TensorFlow Datasets are."""
    limit: int | None = None
    """Keep so many training labels."""
    size: int | None = None
    """Scale images to this many pixels."""
    pad: int = 0
    """Random crops after padding by so many pixels."""
    flip: bool = False
    """Random left-right flips."""
    student: str = "hintjax.models:plain_thin"
    """package.module:factory; called as factory(classes=...)."""
    teacher: str = "hintjax.models:plain_wide"
    """A factory, to train one first, or the run directory of a finished run."""
    pairs: tuple[str, ...] = ()
    """guided=hint for each pair; by default where the method usually attaches."""
    epochs: int = 9
    """Of a student, in all stages together."""
    hint_epochs: int | None = None
    """Of these, how many the stage before has, in a method that has one; by default
    half of them for fitnets, a ninth for others."""
    teacher_epochs: int = 6
    """Of a teacher that is trained here."""
    batch_size: int = 16
    """Examples in a step."""
    accumulate: int = 1
    """Micro-batches that a step takes them in, one after another, to save memory."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = 1e-3
    """Of every stage."""
    rates: tuple[float, ...] = ()
    """In a comparison, learning rates of which each arm takes its best on validation;
    by default those that were found this way on the digits."""
    hinted_rate: float = 1.0
    """Multiplies the rate of layers that the hint stage trained, after it."""
    weight_decay: float = 0.0
    """Decoupled for adam, L2 for sgd."""
    spike_factor: float | None = None
    """Skip steps whose gradient is so many times as long as usual."""
    cosine: bool = False
    """Let the learning rate of each stage fall to 0 along a cosine."""
    temperature: float | None = None
    """Of what compares outputs; the method's usual one by default."""
    negatives: int = 16384
    """Of crd: how many for each example, at most as many as there are examples."""
    task_weight: float | None = None
    """Of the task beside the method; the method's usual one by default."""
    weight: float | None = None
    """Of the method beside the task; its usual one by default."""
    kd_weight: float = 0.0
    """Of kd as one more term, where a method stands beside the task."""
    patience: int | None = None
    """End the hint stage after so many epochs without a lower validation loss."""
    seed: int = 0
    """Of the student, the order of the data, and all else."""
    seeds: int = 3
    """Runs of each arm in a comparison."""
    evaluate_every: int = 1
    """Epochs between two evaluations on the validation split."""
    checkpoint_every: int = 5
    """Epochs between two checkpoints."""
    checkpoint_seconds: float | None = 60.0
    """Seconds after which a report saves one, too, however long an epoch is."""
    dispatch: int | None = None
    """Steps in one dispatch; 1 on a CPU and about a second's on accelerators."""
    devices: int | None = None
    """How many share each batch; all by default, those of other processes too."""
    fsdp: int = 1
    """Of these, over how many large parameters are stored in shares."""
    teacher_at_least: float = 0.5
    """The accuracy on the validation split below which a teacher is warned about."""
    debug: bool = False
    """Check every step: labels, features, losses and gradients; slower."""


def check(config: Config) -> Config:
    """Refuses what could only fail, or mislead, later.

    Raises:
        ValueError: naming the first field that is wrong.
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
        *("evaluate_every", "checkpoint_every", "negatives", "fsdp"),
    ):
        positive_int("config", **{name: getattr(config, name)})
    for name in ("limit", "size", "patience", "dispatch", "devices"):
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
    models = {"student": config.student}
    if ":" in config.teacher:  # else it is a run
        models["teacher"] = config.teacher
    for name, model in models.items():
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", model):
            wanted = f"{name} as package.module:factory"
            do = "For instance hintjax.models:resnet20."
            raise Refusal(message("config", wanted, described(model), do))
    if config.weight == 0 and config.task_weight == 0:
        got = "weight 0 and task_weight 0"
        raise Refusal(message("config", "a loss with a weight > 0", got))
    if config.hint_epochs is not None and not 0 < config.hint_epochs < config.epochs:
        wanted = f"hint_epochs between 1 and epochs - 1 = {config.epochs - 1}"
        raise Refusal(message("config", wanted, f"{config.hint_epochs}"))
    for pair in config.pairs:
        parse_pair(pair)
    return config


def parse_pair(pair: str) -> tuple[str, str]:
    """`guided=hint` as its two paths.

    >>> parse_pair("conv10=conv2")
    ('conv10', 'conv2')
    """
    guided, equal, hint = pair.partition("=")
    if not (guided and equal and hint):
        raise Refusal(message("config", "pairs as guided=hint", described(pair)))
    return guided, hint


def save(config: Config, run_dir: str | os.PathLike[str]) -> None:
    """Writes config.yaml into a run directory."""
    import yaml

    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    write_text(Path(run_dir) / FILE, text)


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a config from a YAML file or from a run directory.

    Raises:
        FileRefusal: if there is none.
        ValueError: for an unknown key (the nearest names are given), or a value of
            the wrong type or range.
        TypeError: if the file does not hold names and values.
    """
    import yaml

    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        do = "Pass a run directory of hintjax, or a YAML file."
        raise FileRefusal(message("config", f"a file {path}", "nothing", do))
    try:
        text = path.read_text(encoding="utf-8")
        node, fields = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, *_NO_YAML) as error:
        got = " ".join(str(error).split())[:300]
        raise Refusal(message("config", f"plain YAML in {path}", got)) from None
    if not isinstance(fields, Mapping):
        got = type(fields).__name__
        raise WrongType(message("config", f"names and values in {path}", got))
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(set(names)) < len(names):
        wanted = f"each name once in {path}"
        got = described(max(names, key=names.count))
        raise Refusal(message("config", wanted, f"{got} again"))
    return from_dict(fields)


def from_dict(fields: Mapping[str, Any]) -> Config:
    """A config from plain names and values, each checked.

    >>> from_dict({"epochs": 3, "hint_epochs": 1}).epochs
    3
    >>> from_dict({"epoch": 3})
    Traceback (most recent call last):
    ...
    ValueError: config: expected a known key, got 'epoch'. Nearest: epochs, ...
    """
    types_of = typing.get_type_hints(Config)
    given = {}
    for name, value in fields.items():
        if name not in types_of:
            do = f"Nearest: {', '.join(nearest(str(name)[:80], types_of))}."
            raise Refusal(message("config", "a known key", described(name), do))
        given[name] = _typed(name, value, types_of[name])
    return check(Config(**given))


def _typed(name, value, wanted):
    options = typing.get_args(wanted) if _is_union(wanted) else (wanted,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            item, _ = typing.get_args(option)
            if isinstance(value, (list, tuple)):
                return tuple(_typed(name, one, item) for one in value)
        elif option is float and type(value) is int and abs(value) <= LARGEST_FLOAT:
            return float(value)
        elif type(value) is option:  # so that a bool is no int
            return value
    names = " or ".join(itertools.chain(*map(_names, options)))
    raise Refusal(message("config", f"{name} to be {names}", described(value)))


def _names(option):
    if typing.get_origin(option) is Literal:
        return typing.get_args(option)
    return [getattr(option, "__name__", str(option))]


def _is_union(annotation):
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
