"""The configuration of a run: a frozen dataclass, in and out of YAML."""

import dataclasses
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from hintjax.experiments.tasks import TASKS
from hintjax.experiments.teacher import teacher_of
from hintjax.training.run_directory import write_text

FILE = "config.yaml"
# Errors of PyYAML's conversions, besides its own errors.
_NO_YAML = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


# `Config` is flat, on disk and for its users. Its fields come from one class for each
# subject, so that `hintjax distill --help` can show them by subject.


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """How the student learns from the teacher.

    Attributes:
        method: Name of the method, from `hintjax methods`. Without a name, several
            methods are compared.
        compare: Names of the methods to compare. By default FitNets, its controls, KD
            and AT.
        rates: Learning rates to try for each method of a comparison; the validation
            split chooses. By default the learning rate, or rates chosen on the digits
            if no methods are named.
        settings: Values of options for single methods of a comparison, each as
            method.option=value, such as at.weight=300; `hintjax tune` finds them. Pairs
            are joined by +. By default all methods have the options of the comparison.
        seeds: Number of runs per method in a comparison, each with its own seed.
        pairs: Pairs of layers, each as guided=hint. By default the pairs of the
            method's authors; `hintjax layers` lists the layers.
        weight: Weight of the method's loss. By default the published weight.
        task_weight: Weight of the task loss beside the method. By default the published
            weight.
        kd_weight: Weight of an additional KD term, for methods beside the task. By
            default no term is added.
        balance: Share of the gradient that the method keeps beside the task, between 0
            and 1, by the layers that both train; its weight is then moved. By default
            weights stay as they are.
        balance_every: Number of steps between two moves of a balanced weight.
        temperature: Softmax temperature of the losses that compare outputs (KD and
            relatives). By default the published temperature.
        negatives: Number of negatives per example in CRD, limited to the number of
            examples.
    """

    method: str | None = None
    compare: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    settings: tuple[str, ...] = ()
    seeds: int = 3
    pairs: tuple[str, ...] = ()
    weight: float | None = None
    task_weight: float | None = None
    kd_weight: float = 0.0
    balance: float | None = None
    balance_every: int = 100
    temperature: float | None = None
    negatives: int = 16384


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The images and labels.

    Attributes:
        dataset: Name of the dataset: digits, a .npz file with the arrays image and
            label, a folder of images (with one folder for each class, or without
            labels), or a name of TensorFlow Datasets.
        task: Kind of the labels: classes; one yes or no; one for each class; numbers; a
            class for each position (dense). All but classification need a .npz file.
        data_dir: Directory with prepared TensorFlow Datasets. By default their usual
            directory.
        limit: Number of training examples to keep. By default all examples.
        labels: Number of training examples that keep their labels; all images are
            used. By default all labels are kept.
        size: Height and width to which images are scaled and cropped at the center, in
            pixels. By default images keep their size.
        range: Range of the pixels in a .npz file that are not uint8, such as floats.
            They are converted to uint8.
        pad: Number of pixels by which training images are padded before a random crop.
            By default nothing is cropped.
        flip: Whether training images are flipped left to right at random.
        views: Number of fixed crops and flips per image, of which each epoch shows one
            in turn. By default every epoch draws new ones; with --cache 4, or 1 if
            nothing is cropped or flipped.
    """

    dataset: str = "digits"
    task: Literal["classification", "binary", "multi-label", "regression", "dense"] = (
        "classification"
    )
    data_dir: str | None = None
    limit: int | None = None
    labels: int | None = None
    size: int | None = None
    range: Literal["0..1", "0..255"] | None = None
    pad: int = 0
    flip: bool = False
    views: int | None = None


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The teacher and the student.

    Attributes:
        student: Factory of the student as package.module:factory, called as
            factory(classes=...).
        teacher: Factory of a teacher to train first, or the run directory of a finished
            run.
        weights: File of weights from torch (.safetensors) for the factory of the
            teacher, which then is not trained. By default there is no file.
        weights_sha256: SHA-256 of the file of weights, which is checked. By default it
            is recorded when the run starts.
        teacher_epochs: Number of epochs for which a teacher from a factory is trained.
        teacher_at_least: Lowest validation accuracy (0 to 1) of a teacher that causes
            no warning. For multi-label, the lowest F1. For regression, the least part
            of the median's error that the teacher removes.
        cache: Whether the teacher runs once per view of an image. Its features are then
            kept in the run directory, and all runs of a comparison share them. If there
            are several processes, all of them must see the run directory.
        cache_dtype: Type in which these features are stored.
        quantize: Whether the student rounds as an int8 file will, in training and in
            evaluation. Its parameters stay in floating point.
    """

    student: str = "hintjax.models:plain_thin"
    teacher: str = "hintjax.models:plain_wide"
    weights: str | None = None
    weights_sha256: str | None = None
    teacher_epochs: int = 6
    teacher_at_least: float = 0.5
    cache: bool = False
    cache_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    quantize: bool = False


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """How long the student is trained, and with which steps.

    Attributes:
        epochs: Number of epochs for the student, over all stages.
        hint_epochs: Number of these epochs in the hint stage, for methods with one. By
            default half for fitnets, tinybert and minilm, and a ninth for the others.
        patience: Number of evaluations without a lower validation loss after which the
            hint stage ends. By default it runs for all of its epochs.
        batch_size: Number of examples per step.
        optimizer: Optimizer: Adam, or SGD with Nesterov momentum 0.9.
        learning_rate: Learning rate, used in every stage.
        cosine: Whether the learning rate of each stage falls to 0 along a cosine.
        hinted_rate: Factor on the learning rate of the layers that a hint stage
            trained, in the stage after it.
        weight_decay: Weight decay: decoupled for Adam, an L2 penalty for SGD. By
            default nothing decays.
        spike_factor: Factor over the usual gradient norm above which a step is skipped.
            By default no step is skipped.
        seed: Seed of the student's initialization, of the order of the data, and of all
            other random numbers.
    """

    epochs: int = 9
    hint_epochs: int | None = None
    patience: int | None = None
    batch_size: int = 16
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    cosine: bool = False
    hinted_rate: float = 1.0
    weight_decay: float = 0.0
    spike_factor: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """How often a run is evaluated and saved.

    Attributes:
        evaluate_every: Number of epochs between two evaluations on the validation
            split.
        checkpoint_every: Number of epochs between two checkpoints.
        checkpoint_seconds: Number of seconds after which a report also saves a
            checkpoint.
    """

    evaluate_every: int = 1
    checkpoint_every: int = 5
    checkpoint_seconds: float | None = 60.0


@dataclasses.dataclass(frozen=True)
class HardwareOptions:
    """The devices, and what they do at once.

    Attributes:
        devices: Number of devices that share each batch. By default all devices, of all
            processes. Each core of a CPU is a device. By default a batch is shared
            between cores only where that was measured to be faster.
        fsdp: Number of devices over which large parameters are sharded (FSDP). By
            default nothing is sharded.
        accumulate: Number of micro-batches into which a step divides its batch, to save
            memory.
        dispatch: Number of steps per dispatch. By default 1 on a CPU, and about one
            second of steps on an accelerator.
        debug: Whether every step checks labels, features, losses and gradients, which
            is slower.
    """

    devices: int | None = None
    fsdp: int = 1
    accumulate: int = 1
    dispatch: int | None = None
    debug: bool = False


# Fields of the last base come first.
@dataclasses.dataclass(frozen=True)
class Config(
    HardwareOptions,
    OutputOptions,
    ScheduleOptions,
    NetworkOptions,
    DataOptions,
    MethodOptions,
):
    """All options of a run; every run directory holds its own as config.yaml."""


@dataclasses.dataclass(frozen=True)
class Adjusted(Config):
    """A config whose weight is a value of the state, not of the compiled program.

    Students of one program can then have different weights.
    """


Options = TypeVar(
    "Options",
    HardwareOptions,
    OutputOptions,
    ScheduleOptions,
    NetworkOptions,
    DataOptions,
    MethodOptions,
)


def part(config: Config, options: type[Options]) -> Options:
    """The fields of one subject.

    >>> part(Config(epochs=3, pad=2), DataOptions).pad
    2
    """
    fields = dataclasses.fields(options)
    return options(**{field.name: getattr(config, field.name) for field in fields})


def joined(*parts: Any) -> Config:
    """The config of all fields; `part` is its inverse.

    >>> joined(ScheduleOptions(epochs=3), DataOptions(pad=2)).epochs
    3
    """
    return Config(**{name: value for one in parts for name, value in vars(one).items()})


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


def parse_pair(pair: str) -> tuple[str, str]:
    """`guided=hint` as its two paths.

    >>> parse_pair("conv10=conv2")
    ('conv10', 'conv2')
    """
    guided, equal, hint = pair.partition("=")
    if not (guided and equal and hint):
        raise Refusal(message("config", "pairs as guided=hint", described(pair)))
    return guided, hint


def _parse_pairs(text: str) -> tuple[str, ...]:
    """Pairs that are joined by +."""
    for pair in text.split("+"):
        parse_pair(pair)
    return tuple(text.split("+"))


Settings = Mapping[str, Any]  # values by the name of a field of a config

# Fields that can differ between the methods of a comparison, and how they are read.
SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "weight": float,
    "learning_rate": float,
    "temperature": float,
    "pairs": _parse_pairs,
    "task_weight": float,
    "kd_weight": float,
    "hinted_rate": float,
    "hint_epochs": int,
    "negatives": int,
}


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting from its text.

    >>> parse_setting("pairs", "conv10=conv2+conv12=conv4")
    ('conv10=conv2', 'conv12=conv4')
    """
    if name not in SETTINGS:
        do = f"Nearest: {', '.join(nearest(name, SETTINGS))}."
        raise Refusal(message("config", "the name of a setting", described(name), do))
    try:
        return SETTINGS[name](text)
    except ValueError as error:
        if isinstance(error, Refusal):
            raise
        kind = SETTINGS[name].__name__
        got = described(text)
        raise Refusal(message("config", f"{name} to be {kind}", got)) from None


def setting_text(name: str, value: Any) -> str:
    """The text from which `parse_setting` reads a value, with its name.

    >>> setting_text("weight", 300.0)
    'weight=300'
    """
    if name == "pairs":
        return f"{name}={'+'.join(value)}"
    shortest = f"{value:g}" if float(f"{value:g}") == value else f"{value!r}"
    return f"{name}={shortest}"


def own_settings(config: Config) -> dict[str, dict[str, Any]]:
    """The settings of single methods of a comparison, by method.

    >>> own_settings(Config(settings=("at.weight=300",)))
    {'at': {'weight': 300.0}}
    """
    found: dict[str, dict[str, Any]] = {}
    for text in config.settings:
        method, dot, rest = text.partition(".")
        name, equal, value = rest.partition("=")
        if not (method and dot and name and equal and value):
            wanted = "settings as method.option=value"
            raise Refusal(message("config", wanted, described(text)))
        found.setdefault(method, {})[name] = parse_setting(name, value)
    return found


def with_settings(config: Config, own: Settings) -> Config:
    """The config with the settings of one of its methods."""
    return dataclasses.replace(config, settings=(), **own)


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
        FileRefusal: if there is no such file.
        Refusal: for an unknown key (the error names the nearest keys), or a value of
            the wrong type or range.
        WrongType: if the file does not hold names and values.
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
    hintjax._checks.Refusal: config: expected a known key, got 'epoch'. Nearest: ...
    """
    types_of = typing.get_type_hints(Config)
    given = {}
    for name, value in fields.items():
        if name not in types_of:
            do = f"Nearest: {', '.join(nearest(str(name)[:80], types_of))}."
            raise Refusal(message("config", "a known key", described(name), do))
        given[name] = _typed(name, value, types_of[name])
    return check(Config(**given))


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """The value as the type that the field has; lists become tuples."""
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


def _names(option: Any) -> Sequence[str]:
    """The values or the type that an error names."""
    if typing.get_origin(option) is Literal:
        return typing.get_args(option)
    return [getattr(option, "__name__", str(option))]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
