"""One run from its config: data, teacher, student, phases, and what is left on disk.

A run directory holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints,
and, when it is finished, the student alone (`student/`, an Orbax tree that a plain
`module.apply` takes) and result.json. Runs of one `Setting` share the data on the
device and their compiled programs.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax

from hintjax.data import Augment, fits_on_device, steps_per_epoch
from hintjax.experiments import config as configs
from hintjax.experiments.finished import DEPLOYED, RESULT, load_student
from hintjax.experiments.phases import compiled_phase
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.setting import Setting, batches_of
from hintjax.export import deployed, deployed_variables
from hintjax.networks import Network, Variables, join
from hintjax.processes import told
from hintjax.sharding import place
from hintjax.stages import student_variables
from hintjax.training import (
    Fitted,
    evaluate,
    fit,
    load_tree,
    on_device,
    save_tree,
    streamed,
)
from hintjax.training.run_directory import owned, write_text

# Of a config: what says nothing of one run's training, or is known better otherwise
# (a teacher by its fingerprint), and what may change when a run goes on.
_ELSEWHERE = (
    *("compare", "data_dir", "rates", "seeds"),
    *("teacher", "teacher_at_least", "teacher_epochs"),
)
_HARMLESS = (
    *("checkpoint_every", "checkpoint_seconds"),
    *("debug", "devices", "dispatch", "fsdp"),
)


def load_deployed(
    setting: Setting, run_dir: str | os.PathLike[str], recipe: Recipe
) -> tuple[Network, Variables]:
    """What a finished run ships: its student, or the network that its method says.

    Args:
        setting: of the run.
        run_dir: of the run.
        recipe: of the run.
    """
    path = Path(run_dir).expanduser()
    if not (path / DEPLOYED).exists():
        return load_student(path)
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
    """One run, from the data to the student on disk.

    Args:
        setting: what it shares with other runs.
        run_dir: where it leaves everything.
        recipe: its phases.
        teacher: the teacher's variables.
        hints: the variables of the hint stage's teacher, if that is another one.
        initial: the network that initialises the student, if that differs.
        learning_rate: instead of the config's.
        seed: instead of the config's.
        **how: resume and show, see `fit`.

    Returns:
        How it went, and what result.json says.
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


def _run(setting, config, run_dir, recipe, teacher, hints, initial, **how):
    dataset = setting.dataset
    initialise, feeding, fitting = jax.random.split(jax.random.key(config.seed), 3)
    augment, layout = Augment(pad=config.pad, flip=config.flip), setting.layout
    mesh = layout and layout.mesh
    if layout is not None:
        teacher, hints = (
            None if variables is None else place(variables, layout)
            for variables in (teacher, hints)
        )
    if fits_on_device(dataset.train):
        feed = on_device(dataset, config.batch_size, feeding, mesh)
    else:
        feed = streamed(dataset, config.batch_size, config.seed, augment, mesh)
    steps = recipe(config, setting.places, feed.per_epoch)
    phases = [
        compiled_phase(setting, step, config, feed.per_epoch)._replace(
            teacher=hints if step.hints_only and hints is not None else teacher
        )
        for step in steps
    ]
    batches = functools.partial(batches_of, setting)
    validation = functools.partial(batches, dataset.validation)
    if fits_on_device(dataset.validation):
        validation = functools.partial(list, list(validation()))
    fitted = fit(
        run_dir,
        phases,
        feed,
        (initial or setting.student).init(initialise, setting.inputs),
        key=fitting,
        validation=validation,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        checkpoint_seconds=config.checkpoint_seconds,
        identity={
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in _ELSEWHERE
        },
        harmless=_HARMLESS,
        dispatch=config.dispatch,
        debug=config.debug,
        **how,
    )
    stage = phases[-1].program.stage
    result = {"steps": fitted.steps, "seconds": round(fitted.seconds, 2)}
    result["spent"] = {name: round(s, 2) for name, s in fitted.spent.items()}
    result |= {"boundaries": list(fitted.boundaries), "classes": dataset.classes}
    for name in ("validation", "test"):
        found = evaluate(stage, fitted.state, teacher, batches(getattr(dataset, name)))
        result |= {f"{name}/{key}": value for key, value in found.items()}
        result[f"{name}/accuracy"] = next(
            value for key, value in found.items() if key.endswith("/accuracy")
        )
    save_tree(run_dir / "student", join(student_variables(fitted.state)))
    method = steps[-1].method
    if method.deploy is not None:
        parts = (fitted.state, method, setting.teacher, teacher, setting.inputs)
        save_tree(run_dir / DEPLOYED, deployed_variables(*parts)._asdict())
    write_text(run_dir / RESULT, json.dumps(result, indent=1))
    return fitted, result
