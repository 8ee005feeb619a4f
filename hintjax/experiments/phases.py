"""The phases of a recipe, as compiled stages."""

import dataclasses
import functools
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from hintjax.data import Augment, steps_per_epoch
from hintjax.experiments.config import Config
from hintjax.experiments.recipes import Recipe, Step
from hintjax.experiments.setting import Setting
from hintjax.method import Data
from hintjax.stages import SpikeGuard, distillation_stage, hint_stage
from hintjax.training import Phase, program


def check(setting: Setting, recipe: Recipe) -> list[Step]:
    """Traces every phase of a recipe on shapes alone: what cannot work raises here.

    Args:
        setting: of the run.
        recipe: its phases.

    Returns:
        The phases.
    """
    config, train = setting.config, setting.dataset.train
    key, size = jax.random.key(0), config.batch_size
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    image = jax.ShapeDtypeStruct((size, *train.shape), jnp.float32)
    batch = {"image": image, "label": of((size,)), "index": of((size,))}
    student, teacher = (
        None if network is None else jax.eval_shape(network.init, key, setting.inputs)
        for network in (setting.student, setting.teacher)
    )
    per_epoch = steps_per_epoch(train.n, size)
    state, steps = None, list(recipe(config, setting.places, per_epoch))
    for step in steps:
        stage = compiled_phase(setting, step, config, per_epoch).program.stage
        carry = state if step.carry else None
        data = Data(of((train.n,)))
        state = jax.eval_shape(stage.init, key, student, teacher, batch, data, carry)
        jax.eval_shape(stage.update, state, teacher, batch)
    return steps


def compiled_phase(setting, step, config, per_epoch):
    built_with = _built_with(step, config)
    if built_with not in setting.programs:
        setting.programs[built_with] = program(
            _stage(setting, step, config, per_epoch),
            config.batch_size,
            Augment(pad=config.pad, flip=config.flip),
            setting.layout and setting.layout.mesh,
        )

    def adjust(state):
        rate = jnp.asarray(config.learning_rate, jnp.float32)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return state._replace(opt_state=opt_state)

    return Phase(
        name=step.name,
        program=setting.programs[built_with],
        steps=step.epochs * per_epoch,
        carry=step.carry,
        patience=config.patience if step.hints_only else None,
        adjust=adjust,
    )


def _built_with(step: Step, config: Config) -> Hashable:
    """All that the program of a phase is built with, besides data and networks.

    The learning rate and the seed are arguments of a program.
    """
    others = dataclasses.replace(
        config, learning_rate=Config.learning_rate, seed=Config.seed
    )
    rates = tuple(sorted(step.rates.items()))
    return step.name, step.source, step.epochs, step.hints_only, rates, others


def _stage(setting, step, config, per_epoch):
    optimiser = _optimiser(config, step.epochs * per_epoch)
    networks = (setting.student, setting.teacher, step.method, optimiser)
    factor = config.spike_factor
    how = {
        "mesh": setting.layout,
        "accumulate": config.accumulate,
        "spikes": None if factor is None else SpikeGuard(factor),
    }
    if step.hints_only:
        return hint_stage(*networks, **how)
    return distillation_stage(*networks, rates=step.rates, **how)


def _optimiser(config, steps):
    """The learning rate is in the state, so that one program serves every rate."""
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
