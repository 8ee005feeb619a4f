"""Many students under one teacher: the numbers of separate runs, the teacher once."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj

N, STEPS = 3, 2
RATES = (0.01, 0.1, 0.2)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def images(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(6, 5, 5, 2)),
        "label": np.arange(6, dtype=np.int32) % 3,
    }


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def made():
    """The stage of one student, three students, and the teacher."""
    student, teacher = hj.linen(Net(4)), hj.linen(Net(6))
    image = images()["image"]
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        hint=hj.fitnets([("norm", "norm")]),
    )
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    stage = hj.distillation_stage(student, teacher, method, optimizer)
    ours = [double(student.init(jax.random.key(i), image)) for i in range(N)]
    return stage, ours, double(teacher.init(jax.random.key(9), image))


def rated(number, state):
    state = double(state)
    state.opt_state[0].hyperparams["learning_rate"] = jnp.asarray(RATES[number])
    return state


@pytest.mark.parametrize("together", [True, False])
def test_each_student_comes_to_what_it_would_alone(together):
    with jax.enable_x64(True):
        stage, ours, theirs = made()
        keys = jax.random.split(jax.random.key(5), N)
        crowd = hj.population(stage, N, together=together)
        members = crowd.init(keys, ours, theirs, images(), adjust=rated)
        for seed in range(STEPS):
            members, metrics = crowd.update(members, theirs, images(seed))
        assert metrics["loss"].shape == (N,)
        for number, state in enumerate(crowd.states(members)):
            alone = stage.init(keys[number], ours[number], theirs, images())
            alone = rated(number, alone)
            for seed in range(STEPS):
                alone, want = stage.update(alone, theirs, images(seed))
            jax.tree.map(
                partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
                (state._replace(key=None), metrics["loss"][number]),
                (alone._replace(key=None), want["loss"]),
            )


def test_the_teacher_is_computed_once():
    def flops(function, *arguments):
        return function.lower(*arguments).cost_analysis()["flops"]

    with jax.enable_x64(True):
        stage, ours, theirs = made()
        keys = jax.random.split(jax.random.key(5), N)
        totals = []
        for n in (1, N):
            crowd = hj.population(stage, n, together=True)
            members = crowd.init(keys[:n], ours[:n], theirs, images())
            totals.append(flops(crowd.update, members, theirs, images()))
        once = flops(jax.jit(partial(stage.teach, None)), theirs, images())
    one, all_of_them = totals
    # Less even: what the losses make of the teacher's features is shared, too.
    assert all_of_them <= N * one - (N - 1) * once
    assert once > one / 20


@pytest.mark.quick
def test_keys_and_students_are_as_many():
    with jax.enable_x64(True):
        stage, ours, theirs = made()
        crowd = hj.population(stage, N)
        two = jax.random.split(jax.random.key(0), 2)
        with pytest.raises(ValueError, match="population: expected 3 of each, got 2 k"):
            crowd.init(two, ours, theirs, images())
    with pytest.raises(ValueError, match="population: expected n to be an integer"):
        hj.population(stage, 0)
