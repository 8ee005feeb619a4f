"""The options of a run, by subject, and the frozen `Config` of all of them.

`Config` is flat, on disk and for its users. Its fields come from one class for each
subject, so that `hintjax distill --help` can show them by subject.
"""

import dataclasses
from typing import Any, Literal, TypeVar


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
        layer_rates: Factors on the learning rate of all parameters up to a layer, each
            as layer=factor, in every stage but a hint stage. The factors of several
            layers multiply; 0 freezes. `hintjax layers` lists the layers.
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
    layer_rates: tuple[str, ...] = ()
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
