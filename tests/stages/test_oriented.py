"""DOT's momentum: one buffer for the task, and one for the other terms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.stages.oriented import OrientedState
from hintjax.training import open_checkpoints

BATCH, STEPS, RATE, DECAY = 16, 3, 0.1, 0.3
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


class Net(nn.Module):
    """The task moves both layers, and a hint only the first."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(self.width, name="first")(x))
        return nn.Dense(3, name="head")(x)


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


def images(step=0):
    generator = np.random.default_rng(step)
    label = np.arange(BATCH, dtype=np.int32) % 3
    return {"image": generator.normal(size=(BATCH, 4)) + label[:, None], "label": label}


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def inputs(batch):
    return batch["image"]


@functools.cache
def networks():
    student, teacher = hj.linen(Net(4)), hj.linen(Net(6))
    variables = [
        double(jax.jit(network.init)(jax.random.key(i), images()["image"]))
        for i, network in enumerate((student, teacher))
    ]
    return (student, teacher), variables


def made(optimizer, task=0.5, **how):
    method = hj.objective(
        task=hj.weighted(hj.task(CROSS_ENTROPY), task),
        hint=hj.weighted(hj.fitnets([("first", "first")]), 2.0),
    )
    both, _ = networks()
    return hj.distillation_stage(
        *(*both, method, optimizer), inputs=inputs, teacher_inputs=inputs, **how
    )


def begun(stage):
    _, (ours, theirs) = networks()
    return double(stage.init(jax.random.key(2), ours, theirs, images()))


def trained(optimizer, steps=STEPS, **how):
    stage = made(optimizer, **how)
    state = begun(stage)
    for step in range(steps):
        state, _ = stage.update(state, networks()[1][1], images(step))
    return state


def oriented(*arguments):
    return optax.chain(
        optax.add_decayed_weights(DECAY),
        hj.distillation_oriented(*arguments),
        optax.scale_by_learning_rate(RATE),
    )


def close(first, second):
    for one, other in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def gradient_of_the_task(params, batch):
    """By the student's parameters, from the formula of the cross-entropy."""
    network = networks()[0][0]

    def mean(params):
        wants = hj.Wants(output=True)
        how = {"wants": wants, "train": True}
        shown, _ = network.apply(params, {}, batch["image"], **how)
        return 0.5 * CROSS_ENTROPY(shown.output, batch["label"]).mean()

    return jax.grad(mean)(params)


def test_the_updates_are_those_of_a_loop_in_numpy():
    """The first layer has both momenta; the head and the regressor have the usual."""
    one = made(optax.sgd(1.0))  # which moves by the gradient
    theirs, state = networks()[1][1], begun(one)
    params = jax.tree.map(np.asarray, state.params)
    buffers = [jax.tree.map(np.zeros_like, params) for _ in range(2)]
    task, taught = {"first": 0.9 - 0.08, "head": 0.9}, {"first": 0.9 + 0.08}
    for step in range(STEPS):
        batch = images(step)
        here = state._replace(params=jax.tree.map(jnp.asarray, params))
        after, _ = one.update(here, theirs, batch)
        state = begun(one)
        whole = jax.tree.map(np.subtract, params, after.params)
        own = jax.tree.map(np.zeros_like, params)
        own["student"] = gradient_of_the_task(params["student"], batch)

        def moved(path, x, g, t, v, w):
            layer = path[1].key if path[0].key == "student" else "regressor"
            v[...] = task.get(layer, 0.9) * v + t + DECAY * x
            w[...] = taught.get(layer, 0.9) * w + (g - t)
            return x - RATE * (v + w)

        params = jax.tree_util.tree_map_with_path(moved, params, whole, own, *buffers)
    found = trained(oriented(0.9, 0.08))
    close(found.params, params)
    (kept,) = (
        one
        for one in jax.tree.leaves(
            found.opt_state, is_leaf=lambda x: isinstance(x, OrientedState)
        )
        if isinstance(one, OrientedState)
    )
    close(kept[:2], buffers)


def test_without_a_difference_it_is_sgd_with_momentum():
    decay = optax.add_decayed_weights(DECAY)
    plain = optax.chain(decay, optax.sgd(RATE, momentum=0.9))
    close(trained(oriented(0.9, 0.0)).params, trained(plain).params)


@pytest.fixture(scope="module")
def alone():
    with jax.enable_x64(True):
        return trained(oriented())


@pytest.mark.parametrize("how", ["accumulate", "mesh"])
def test_micro_batches_and_devices_change_nothing(alone, how):
    mesh = {"mesh": hj.make_mesh(fsdp=2, devices=jax.devices()[:4])}
    found = trained(oriented(), **({"accumulate": 4} if how == "accumulate" else mesh))
    close(found.params, alone.params)
    close(found.opt_state, alone.opt_state)


def test_a_checkpoint_holds_both_buffers(alone, tmp_path):
    stage = made(oriented())
    state = trained(oriented(), steps=2)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
        state, _ = checkpoints.restore(begun(stage))
    state, _ = stage.update(state, networks()[1][1], images(2))
    close(state.params, alone.params)


def test_a_part_of_the_parameters_can_have_it(alone):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path[1].key == "head" else "oriented", params
        )

    parts = {"oriented": oriented(), "frozen": optax.set_to_zero()}
    state = trained(optax.partition(parts, labels), steps=1)
    start = begun(made(oriented())).params["student"]
    close(state.params["student"]["head"], start["head"])
    whole = trained(oriented(), steps=1)
    close(state.params["student"]["first"], whole.params["student"]["first"])


@pytest.mark.quick
def test_a_momentum_that_cannot_work_is_refused():
    for arguments, sentence in (
        ((0.9, 0.1), r"0\.9 \+ 0\.1 to be in \[0, 1\), got 1\.0"),
        ((0.05, 0.1), r"0\.05 - 0\.1 to be in \[0, 1\), got -0\.05"),
        ((0.9, -0.1), "delta to be >= 0, got -0.1"),
    ):
        with pytest.raises(
            hj.Refusal, match=f"distillation_oriented: expected {sentence}"
        ):
            hj.distillation_oriented(*arguments)


@pytest.mark.quick
def test_the_term_of_the_task_is_needed_and_so_is_a_stage():
    stage = made(hj.distillation_oriented(task="labels"))
    words = r"the term 'labels', got the terms \['task', 'hint'\]"
    with pytest.raises(hj.Refusal, match=words):
        jax.eval_shape(stage.update, begun(stage), networks()[1][1], images())
    both, (_, theirs) = networks()
    alone = hj.hint_stage(
        *(*both, hj.fitnets([("first", "first")]), oriented()),
        inputs=inputs,
        teacher_inputs=inputs,
    )
    with pytest.raises(hj.Refusal, match="'task', got a method without terms"):
        jax.eval_shape(alone.update, begun(alone), theirs, images())
    transform, params = hj.distillation_oriented(), {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="grad and grad_of_term beside the gradien"):
        transform.update(params, transform.init(params), params)
