"""One run from its config, from the data to the student on disk.

A run directory holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints,
and, when it is finished, the student alone (`student/`, an Orbax tree that a plain
`module.apply` takes) and result.json. Runs of one `Setting` share the data on the
device and their compiled programs.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from hintjax.data import ON_DEVICE, Split, fits_on_device, steps_per_epoch
from hintjax.experiments import config as configs
from hintjax.experiments.cached_teacher import crops_of
from hintjax.experiments.config import Config
from hintjax.experiments.finished import DEPLOYED, RESULT, load_student
from hintjax.experiments.phases import compiled_phase
from hintjax.experiments.recipes import PlannedPhase, Recipe
from hintjax.experiments.setting import Setting, batches_of, seen
from hintjax.export import deployed, deployed_variables
from hintjax.method import Method
from hintjax.networks import Network, Variables, join
from hintjax.processes import told
from hintjax.sharding import place
from hintjax.stages import Stage, student_variables
from hintjax.training import (
    Feed,
    Fitted,
    Phase,
    evaluate,
    fit,
    load_tree,
    on_device,
    save_tree,
    streamed,
)
from hintjax.training.run_directory import owned, write_text

# Fields of a config that the resume check leaves out: they do not change the training
# of one run, or the checkpoint knows them better (a teacher by its fingerprint).
_ELSEWHERE = (
    *("compare", "data_dir", "rates", "seeds"),
    *("teacher", "teacher_at_least", "teacher_epochs", "weights", "weights_sha256"),
)
# Fields that runs of an earlier version did not have, with the value that they had.
_LATER = {
    name: getattr(Config, name)
    for name in (
        *("task", "labels", "balance", "balance_every", "quantize", "settings"),
    )
}
# Fields that may change when a run resumes.
_HARMLESS = (
    *("checkpoint_every", "checkpoint_seconds"),
    *("debug", "devices", "dispatch", "fsdp"),
)


def load_deployed(
    setting: Setting, run_dir: str | os.PathLike[str], recipe: Recipe
) -> tuple[Network, Variables]:
    """The network that a finished run deploys, which is the student for most methods.

    Args:
        setting: setting of the run.
        run_dir: run directory.
        recipe: recipe of the run.
    """
    path = Path(run_dir).expanduser()
    if not (path / DEPLOYED).exists():
        return load_student(path, rounding=setting.config.quantize)
    per_epoch = steps_per_epoch(setting.dataset.train.n, setting.config.batch_size)
    method = recipe(setting.config, setting.places, per_epoch)[-1].method
    variables = Variables(**load_tree(path / DEPLOYED))
    return deployed(setting.student, setting.teacher, method), variables


def run(
    setting: Setting,
    run_dir: Path,
    recipe: Recipe,
    *,
    teacher: Variables | None = None,
    hints: Variables | None = None,
    initial: Network | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    **how: Any,
) -> tuple[Fitted, dict[str, Any]]:
    """Runs one training, from the data to the student on disk.

    Args:
        setting: parts that runs share.
        run_dir: directory for all results.
        recipe: recipe of the phases.
        teacher: variables of the teacher.
        hints: variables of the teacher in the hint stage, if they differ.
        initial: network that initializes the student, if it differs.
        learning_rate: learning rate, if it is not the config's.
        seed: seed, if it is not the config's.
        **how: resume and show, see `fit`.

    Returns:
        The result of `fit`, and the contents of result.json.
    """
    config = setting.config
    config = dataclasses.replace(
        config,
        learning_rate=learning_rate or config.learning_rate,
        seed=config.seed if seed is None else seed,
    )
    with owned(run_dir):
        if not told((run_dir / configs.FILE).exists):
            configs.save(config, run_dir)
        return _run(setting, config, run_dir, recipe, teacher, hints, initial, **how)


def _run(
    setting: Setting,
    config: Config,
    run_dir: Path,
    recipe: Recipe,
    teacher: Variables | None,
    hints: Variables | None,
    initial: Network | None,
    **how: Any,
) -> tuple[Fitted, dict[str, Any]]:
    """Trains, evaluates and saves the student in a run directory that is owned."""
    initialize, feeding, fitting = jax.random.split(jax.random.key(config.seed), 3)
    if setting.layout is not None:
        teacher, hints = (
            None if variables is None else place(variables, setting.layout)
            for variables in (teacher, hints)
        )
    feed = feed_of(setting, config, feeding)
    planned = recipe(config, setting.places, feed.per_epoch)
    phases = phases_of(setting, config, planned, feed.per_epoch, teacher, hints)
    fitted = fit(
        run_dir,
        phases,
        feed,
        (initial or setting.student).init(initialize, setting.inputs),
        key=fitting,
        validation=validation_of(setting),
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        checkpoint_seconds=config.checkpoint_seconds,
        identity={
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in _ELSEWHERE and (name, value) not in _LATER.items()
        }
        | _images(setting),
        harmless=_HARMLESS,
        dispatch=config.dispatch,
        debug=config.debug,
        compare_gradients=True,
        **how,
    )
    last = phases[-1]
    result = _result(setting, last.program.stage, fitted, last.teacher)
    _save(setting, run_dir, planned[-1].method, fitted, teacher)
    write_text(run_dir / RESULT, json.dumps(result, indent=1))
    return fitted, result


def phases_of(
    setting: Setting,
    config: Config,
    planned: Sequence[PlannedPhase],
    per_epoch: int,
    teacher: Variables | None,
    hints: Variables | None = None,
) -> list[Phase]:
    """The phases as the loop trains them, each with its teacher: live or cached.

    Args:
        setting: setting of the run.
        config: config of the run.
        planned: phases of the recipe.
        per_epoch: steps in an epoch.
        teacher: variables of the teacher, or their shapes.
        hints: variables of the teacher in the hint stage, if they differ.
    """

    def phase_of(phase: PlannedPhase) -> Phase:
        of, cache = teacher, setting.cache
        if phase.hints_only and hints is not None:
            of, cache = hints, None  # the cache holds features of the other teacher
        if of is None or cache is None or not cache.serves(phase.method):
            made = compiled_phase(setting, phase, config, per_epoch)
            return made._replace(teacher=of)
        made = compiled_phase(setting, phase, config, per_epoch, cache)
        return made._replace(teacher=cache.variables(of))

    return [phase_of(phase) for phase in planned]


def feed_of(setting: Setting, config: Config, key: Key[Array, ""]) -> Feed:
    """The batches of a run: from the device if the training set fits, else streamed."""
    dataset, mesh = setting.dataset, setting.layout and setting.layout.mesh
    crops = crops_of(config, dataset.train.n)
    cache = setting.cache
    if cache is not None and cache.on_device is None:
        also = cache.with_rows
        return streamed(dataset, config.batch_size, key, mesh, crops, also)
    near = isinstance(dataset.train, Split) and fits_on_device(dataset.train)
    feed = on_device if near else streamed
    return feed(dataset, config.batch_size, key, mesh, crops)


def _images(setting: Setting) -> dict[str, Any]:
    """The images, for the resume check: files of a folder change more easily."""
    dataset = setting.dataset
    folder = Path(setting.config.dataset).expanduser().is_dir()
    if dataset.labeled and not folder:
        return {}  # as in runs of an earlier version
    return {"images": seen(dataset)["train"]}


def validation_of(setting: Setting) -> Callable[[], Iterable[Any]]:
    """Makes the validation batches anew; they stay on the device if they fit."""
    split = setting.dataset.validation
    batches = functools.partial(batches_of, setting, split)
    if fits_on_device(split, limit=ON_DEVICE // 4):  # as float32
        return functools.partial(list, list(batches()))
    return batches


def _result(
    setting: Setting, stage: Stage, fitted: Fitted, teacher: Variables | None
) -> dict[str, Any]:
    """The contents of result.json: time, steps, and metrics of the last stage.

    Without labels, these are the losses and the R^2 of the hints.
    """
    dataset = setting.dataset
    result = {"steps": fitted.steps, "seconds": round(fitted.seconds, 2)}
    result["spent"] = {name: round(s, 2) for name, s in fitted.spent.items()}
    result |= {"boundaries": list(fitted.boundaries), "classes": dataset.classes}
    result["class_names"] = list(dataset.class_names)
    result["standardize"] = {
        name: np.ravel(array).tolist()
        for name, array in dataset.standardize._asdict().items()
    }
    for name in ("validation", "test"):
        batches = batches_of(setting, getattr(dataset, name))
        found = evaluate(stage, fitted.state, teacher, batches)
        metric = setting.task.name
        if not dataset.labeled:
            found = {k: v for k, v in found.items() if not k.endswith(f"/{metric}")}
        result |= {f"{name}/{key}": value for key, value in found.items()}
        if not dataset.labeled:
            continue
        result[f"{name}/{metric}"] = next(
            value for key, value in found.items() if key.endswith(f"/{metric}")
        )
    return result


def _save(
    setting: Setting,
    run_dir: Path,
    method: Method,
    fitted: Fitted,
    teacher: Variables | None,
) -> None:
    """Saves the student alone, and the deployed network if the method has another."""
    save_tree(run_dir / "student", join(student_variables(fitted.state)))
    if method.deploy is not None:
        parts = (fitted.state, method, setting.teacher, teacher, setting.inputs)
        save_tree(run_dir / DEPLOYED, deployed_variables(*parts)._asdict())
