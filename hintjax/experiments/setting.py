"""The parts that the runs of a config share: data, networks, mesh, programs."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hintjax._checks import Refusal, message
from hintjax.data import (
    Dataset,
    Files,
    Source,
    Split,
    evaluation_batches,
    load,
    steps_per_epoch,
)
from hintjax.experiments import config as configs
from hintjax.experiments.attachment import Places
from hintjax.experiments.cached_teacher import CachedTeacher
from hintjax.experiments.config import Config
from hintjax.experiments.devices import mesh_of
from hintjax.experiments.factories import (
    attribute_of,
    check_learns,
    check_output,
    layers,
    network,
    output_shape,
    student_network,
)
from hintjax.experiments.finished import evaluation_size, load_student, run_config
from hintjax.experiments.pretrained import pretrained
from hintjax.experiments.tasks import TASKS, Task
from hintjax.experiments.teacher import teacher_of
from hintjax.networks import Network, Variables, join
from hintjax.processes import agree, each
from hintjax.sharding import Layout, over_batch, shares, spread
from hintjax.training import Program


class Setting(NamedTuple):
    """The parts that the runs of a config share.

    Attributes:
        config: config of the run, or of the comparison.
        dataset: images and labels, on the host.
        inputs: one image, which gives the shapes.
        student: network of the student.
        teacher: network of the teacher; None if no teacher is needed.
        places: layers of both networks, to which methods attach.
        layout: mesh on which the runs train; None for a single device.
        programs: compiled stages by all that they are built with; filled during runs.
        cache: the teacher's features of all training examples, or None.
    """

    config: Config
    dataset: Dataset
    inputs: jax.Array
    student: Network
    teacher: Network | None
    places: Places
    layout: Layout | None
    programs: dict[Any, Program]
    cache: CachedTeacher | None = None

    @property
    def task(self) -> Task:
        """The task of the config."""
        return TASKS[self.config.task]


def prepare(config: Config, *, teach: bool = False) -> Setting:
    """Reads the data and builds the networks of a run; trains nothing.

    Args:
        config: config of the run.
        teach: whether the run needs a teacher.

    Returns:
        The setting.
    """
    dataset = each(
        lambda: load(
            config.dataset,
            config.data_dir,
            limit=config.limit,
            labels=config.labels,
            size=config.size,
            range=config.range,
            targets=TASKS[config.task].targets,
        )
    )
    if jax.process_count() > 1:
        agree("data", seen(dataset))
    steps_per_epoch(dataset.train.n, config.batch_size)  # raises
    inputs = jnp.zeros((1, *dataset.train.shape), jnp.float32)
    dataset, teacher = _taught(config, dataset, inputs, teach)
    student = each(lambda: student_network(config, dataset.classes))
    factories = [
        config.student,
        *([_factory(config.teacher)] if teach else []),
    ]

    for name, made in zip(factories, (student, teacher), strict=False):
        if made is not None:
            check_output(name, made, inputs)
            weights = config.weights if made is teacher else None
            if dataset.labeled:
                check_learns(name, dataset.classes, weights)
    layout = mesh_of(config, student, inputs)  # which runs the student's forward pass

    def said(attribute: str, missing: Any) -> tuple[Any, ...]:
        return tuple(
            attribute_of(name, dataset.classes, attribute, missing)
            for name in factories
        )

    places = Places(
        student=layers(student, inputs),
        teacher={} if teacher is None else layers(teacher, inputs),
        pairs=tuple(map(configs.parse_pair, config.pairs)),
        preactivations=said("preactivations", {}),
        norms=said("norms", {})[-1],
        class_tokens=said("class_tokens", 0),
        examples=dataset.train.n,
        labels=config.labels if dataset.labeled else 0,
        same_outputs=teacher is None
        or output_shape(student, inputs) == output_shape(teacher, inputs),
        mesh=layout and layout.mesh,
    )
    return Setting(config, dataset, inputs, student, teacher, places, layout, {})


def _taught(
    config: Config, dataset: Dataset, inputs: jax.Array, teach: bool
) -> tuple[Dataset, Network | None]:
    """The dataset and the network of the teacher, if one is needed.

    Without labels, the student has as many outputs as the teacher.
    """
    if dataset.labeled:
        teacher = teacher_network(config, dataset, inputs) if teach else None
        return dataset, teacher
    if teach and teacher_of(config.teacher, config.weights).trained_here:
        wanted = f"labels in {config.dataset}, to train the teacher {config.teacher}"
        do = "Name a trained teacher: --teacher RUN_DIR, or --weights FILE."
        raise Refusal(message("distill", wanted, "none", do))
    if not teach:
        wanted = f"labels in {config.dataset}, to train without a teacher"
        raise Refusal(message("distill", wanted, "none"))
    teacher = teacher_network(config, dataset._replace(classes=1), inputs)
    check_output(config.teacher, teacher, inputs)
    return dataset._replace(classes=output_shape(teacher, inputs)[-1]), teacher


def teacher_network(config: Config, dataset: Dataset, inputs: jax.Array) -> Network:
    """The network of the configured teacher, whether it is trained yet or not.

    Args:
        config: config of the run.
        dataset: the dataset. A teacher that is trained first has its classes, and a
            teacher from a finished run or a file keeps its own.
        inputs: one image of the dataset.

    Raises:
        Refusal: if the run is not finished, or its student takes other images; or if
            the network and the file of weights do not match.
    """
    teacher = teacher_of(config.teacher, config.weights)
    name = config.teacher
    if teacher.weights is not None:
        given = dataset.classes, inputs, dataset.standardize
        return pretrained(name, teacher.weights, *given)[0]
    if teacher.run_dir is None:
        return each(lambda: network(name, dataset.classes))
    made, variables = load_student(teacher.run_dir)
    wanted = jax.eval_shape(made.init, jax.random.key(0), inputs)
    there, here = map(_shapes, (variables, wanted))
    other = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if other:
        shapes = f"{there.get(other[0])} in the teacher, {here.get(other[0])} for these"
        got = f"{inputs.shape[1:]} of {config.dataset} ({other[0]}: {shapes})"
        trained = run_config(teacher.run_dir).dataset
        wanted = f"images like those of {trained}, on which {teacher.run_dir} learned"
        do = "Name a teacher of such images, or a factory to train one."
        raise Refusal(message("teacher", wanted, got, do))
    return made


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    """The shapes of all variables by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(join(variables))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.shape(leaf) for path, leaf in leaves}


def taught_by(setting: Setting) -> Network:
    """The network of the teacher.

    Raises:
        Refusal: if the runs of the setting have no teacher.
    """
    if setting.teacher is None:
        raise Refusal(message("setting", "a teacher", "none"))
    return setting.teacher


def seen(dataset: Dataset) -> dict[str, Any]:
    """Numbers that tell datasets apart; images on disk are not read for them."""
    found = {
        "classes": dataset.classes,
        "mean and std": [array.tolist() for array in dataset.standardize],
    }
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        arrays: Sequence[Any] = split if isinstance(split, Split) else ()
        if isinstance(split, Files):
            arrays = split.checksum, split.label
        sums = [zlib.crc32(np.ascontiguousarray(array).data) for array in arrays]
        found[name] = [split.n, *split.shape, *sums]
    return found


def _factory(teacher: str) -> str:
    """The factory of a teacher, or of the student of its run."""
    run_dir = teacher_of(teacher).run_dir
    return teacher if run_dir is None else run_config(run_dir).student


def batches_of(setting: Setting, split: Source) -> Iterator[dict[str, Any]]:
    """The batches of a split for evaluation, which all devices can share."""
    mesh = setting.layout and setting.layout.mesh
    parts = 1 if mesh is None else shares(mesh)
    size = evaluation_size(split, setting.config, parts)
    found = evaluation_batches(split, size, setting.dataset.standardize)
    return found if mesh is None else (spread(b, over_batch(mesh)) for b in found)
