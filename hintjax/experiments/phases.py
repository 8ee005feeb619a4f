"""The phases of a recipe: checked on shapes, then stages that the loop trains."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hintjax._checks import Refusal, message
from hintjax.data import Augment, steps_per_epoch
from hintjax.experiments.attachment import compares_outputs
from hintjax.experiments.cached_teacher import CachedTeacher
from hintjax.experiments.config import Config, layer_rates
from hintjax.experiments.factories import output_shape
from hintjax.experiments.recipes import PlannedPhase, Recipe
from hintjax.experiments.setting import Setting, taught_by
from hintjax.experiments.teacher import teacher_of
from hintjax.method import Data
from hintjax.networks import Network
from hintjax.stages import (
    SpikeGuard,
    Stage,
    State,
    distillation_stage,
    hint_stage,
    image,
)
from hintjax.training import Phase, program


def check(setting: Setting, recipe: Recipe) -> list[PlannedPhase]:
    """Traces every phase of a recipe on shapes alone; a phase that cannot work raises.

    Args:
        setting: setting of the run.
        recipe: recipe of the run.

    Returns:
        The phases of the recipe.
    """
    config, train = setting.config, setting.dataset.train
    key, size = jax.random.key(0), config.batch_size
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    image = jax.ShapeDtypeStruct((size, *train.shape), jnp.float32)
    one = train.labels(np.arange(1))
    labels = functools.partial(jax.ShapeDtypeStruct, dtype=one.dtype)
    label = labels((size, *one.shape[1:]))
    batch = {"image": image, "label": label, "index": of((size,))}
    student, teacher = (
        None if network is None else jax.eval_shape(network.init, key, setting.inputs)
        for network in (setting.student, setting.teacher)
    )
    _check_head(setting, "student", setting.student)
    trained_here = teacher_of(config.teacher, config.weights).trained_here
    if setting.teacher is not None and trained_here:
        _check_head(setting, "teacher", setting.teacher)
    per_epoch = steps_per_epoch(train.n, size)
    state, phases = None, list(recipe(config, setting.places, per_epoch))
    for phase in phases:
        _check_outputs(setting, phase)
        stage = compiled_phase(setting, phase, config, per_epoch).program.stage
        carry = state if phase.carry else None
        data = jax.eval_shape(Data, labels((train.n, *one.shape[1:])))
        state = jax.eval_shape(stage.init, key, student, teacher, batch, data, carry)
        jax.eval_shape(stage.update, state, teacher, batch)
    return phases


def check_balance(config: Config, phases: Sequence[PlannedPhase]) -> None:
    """Raises if a config asks for a balance, and no phase of its runs has one.

    Args:
        config: config of the run.
        phases: phases of all recipes of the run.
    """
    if config.balance is not None and all(phase.balance is None for phase in phases):
        names = ", ".join(dict.fromkeys(phase.name for phase in phases))
        wanted = "a method beside the task, whose share can be balanced"
        do = "Leave out --balance, or choose another method."
        raise Refusal(message("distill", wanted, names, do))


def _check_outputs(setting: Setting, phase: PlannedPhase) -> None:
    """Raises if a phase compares outputs whose shapes differ."""
    places, config = setting.places, setting.config
    if places.same_outputs or not compares_outputs(phase.method, places):
        return
    ours, theirs = (
        output_shape(network, setting.inputs)
        for network in (setting.student, taught_by(setting))
    )
    wanted = f"a teacher with outputs {ours} of the student, for {phase.name}"
    got = f"outputs {theirs} of {config.teacher}"
    do = "A method of hints, such as fitnets or at, works with this teacher."
    if config.kd_weight:
        do = "Leave out --kd-weight, or train another teacher."
    raise Refusal(message("distill", wanted, got, do))


def _check_head(setting: Setting, who: str, network: Network) -> None:
    """Raises if a network that is trained here has fewer outputs than classes.

    The loss of a label beyond the outputs is not finite, so its updates are skipped.
    """
    classes = setting.dataset.classes
    outputs = output_shape(network, setting.inputs)[-1]
    if outputs < classes:
        wanted = f"a {who} with an output for each of the {classes} classes"
        do = f"Give --{who} a factory that makes `classes` outputs."
        raise Refusal(message("distill", wanted, f"{outputs} outputs", do))


def compiled_phase(
    setting: Setting,
    phase: PlannedPhase,
    config: Config,
    per_epoch: int,
    cache: CachedTeacher | None = None,
) -> Phase:
    """The phase as the loop trains it; phases that are built alike share a program.

    Args:
        setting: setting of the run; its programs are looked up, and extended.
        phase: phase of the run's recipe.
        config: config of the run, which may have another learning rate and seed than
            the setting's config.
        per_epoch: steps in an epoch.
        cache: the teacher's features, if the phase reads them from a cache.
    """
    built_with = (*_built_with(phase, config), cache is not None)
    if built_with not in setting.programs:
        setting.programs[built_with] = program(
            _stage(setting, phase, config, per_epoch, cache),
            config.batch_size,
            Augment(pad=config.pad, flip=config.flip),
            setting.layout and setting.layout.mesh,
        )

    def adjust(state: State) -> State:
        rate = jnp.asarray(config.learning_rate, jnp.float32)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return state._replace(opt_state=opt_state)

    return Phase(
        name=phase.name,
        program=setting.programs[built_with],
        steps=phase.epochs * per_epoch,
        carry=phase.carry,
        patience=config.patience if phase.hints_only else None,
        adjust=adjust,
        balance=phase.balance,
    )


def _built_with(phase: PlannedPhase, config: Config) -> tuple[Hashable, ...]:
    """Everything from which a program is built, besides data and networks.

    The learning rate and the seed are arguments of a program.
    """
    others = dataclasses.replace(
        config, learning_rate=Config.learning_rate, seed=Config.seed
    )
    rates = tuple(sorted(phase.rates.items()))
    return phase.name, phase.source, phase.epochs, phase.hints_only, rates, others


def _stage(
    setting: Setting,
    phase: PlannedPhase,
    config: Config,
    per_epoch: int,
    cache: CachedTeacher | None,
) -> Stage:
    """The update of a phase."""
    teacher, method, inputs = setting.teacher, phase.method, image
    if cache is not None:
        contents = cache.contents
        teacher, inputs = contents.network, contents.inputs
        method = contents.reading(method)
    optimizer = _optimizer(config, phase.epochs * per_epoch)
    factor = config.spike_factor
    how = {
        "teacher_inputs": inputs,
        "mesh": setting.layout,
        "accumulate": config.accumulate,
        "spikes": None if factor is None else SpikeGuard(factor),
    }
    if phase.hints_only:
        teacher = teacher or taught_by(setting)
        return hint_stage(setting.student, teacher, method, optimizer, **how)
    rates = layer_rates(config)
    for path, rate in phase.rates.items():
        rates[path] = rate * rates.get(path, 1.0)
    return distillation_stage(
        setting.student, teacher, method, optimizer, rates=rates, **how
    )


def _optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer; its state holds the rate, so that all rates share a program."""
    decay, rate = config.weight_decay, config.learning_rate
    if config.optimizer == "adam":
        made = optax.inject_hyperparams(optax.adamw)(rate, weight_decay=decay)
    else:
        sgd = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
        made = optax.chain(
            optax.add_decayed_weights(decay), optax.inject_hyperparams(sgd)(rate)
        )
    if config.cosine:
        made = optax.chain(
            made, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps))
        )
    return made
