"""Many students under one teacher: the results of separate runs, one teacher pass."""

import re
from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.sharding import place
from hintjax.training import open_checkpoints

N, STEPS, BATCH, CLASSES = 4, 2, 8, 3
RATES = (0.01, 0.1, 0.2, 0.1)
WEIGHTS = (10.0, 0.3, 0.3, 10.0)
WIDTH = 6  # of the teacher


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


@pytest.fixture(autouse=True)
def in_double_precision():
    with jax.enable_x64(True):
        yield


def images(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(BATCH, 5, 5, 2)),
        "label": np.arange(BATCH, dtype=np.int32) % CLASSES,
    }


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def made(weight, mesh=None):
    """The stage of one student, some students, and the teacher."""
    student, teacher = hj.linen(Net(4)), hj.linen(Net(WIDTH))
    image = images()["image"]
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        hint=hj.weighted(hj.fitnets([("norm", "norm")]), weight),
    )
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    stage = hj.distillation_stage(student, teacher, method, optimizer, mesh=mesh)
    start = jax.jit(student.init)  # otherwise every operation would be one program
    ours = [double(start(jax.random.key(i), image)) for i in range(N)]
    return stage, ours, double(jax.jit(teacher.init)(jax.random.key(9), image))


def keys(n=N):
    return jax.random.split(jax.random.key(5), n)


def rated(number, state):
    state = double(state)
    state.opt_state[0].hyperparams["learning_rate"] = jnp.asarray(RATES[number])
    return state


def adjusted(number, state):
    return hj.reweighted(rated(number, state), hint=WEIGHTS[number])


@pytest.fixture(scope="module")
def alone():
    """The result of each student alone, with its weight as a number."""
    found = []
    with jax.enable_x64(True):
        by_weight = {weight: made(weight) for weight in WEIGHTS}
        for number, weight in enumerate(WEIGHTS):
            stage, ours, theirs = by_weight[weight]
            state = stage.init(keys()[number], ours[number], theirs, images())
            state = rated(number, state)
            for seed in range(STEPS):
                state, metrics = stage.update(state, theirs, images(seed))
            found.append((state, metrics))
    return found


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("together", [True, False])
def test_each_student_comes_to_what_it_would_alone(alone, together, devices):
    """Each student has its own seed, parameters, learning rate and weight."""
    stage, ours, theirs = made(hj.Adjustable(1.0))
    mesh = devices and hj.data_mesh(jax.devices()[:devices])
    crowd = hj.population(stage, N, together=together, mesh=mesh)
    members = crowd.init(keys(), ours, theirs, images(), adjust=adjusted)
    for seed in range(STEPS):
        members, metrics = crowd.update(members, theirs, images(seed))
    assert metrics["loss"].shape == (N,)
    states = crowd.states(members)
    for number, (want, reported) in enumerate(alone):
        state = states[number]
        memory = dict(state.memory)
        assert memory.pop("weights") == {"hint": WEIGHTS[number]}
        assert jax.tree.structure(state) != jax.tree.structure(want)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
            (
                state._replace(key=None, memory=memory),
                {name: value[number] for name, value in metrics.items()},
            ),
            (want._replace(key=None), reported),
        )
    # The students can be put together again.
    again = crowd.states(crowd.members(states))
    assert all(map(jnp.array_equal, *map(jax.tree.leaves, (again, states))))
    # One student continues alone.
    state, _ = stage.update(states[1], theirs, images())
    assert state.step == STEPS + 1


def flops(function, *arguments):
    return function.lower(*arguments).compile().cost_analysis()["flops"]


def test_the_teacher_is_computed_once():
    stage, ours, theirs = made(1.0)
    totals = []
    for n in (1, N):
        crowd = hj.population(stage, n, together=True)
        members = crowd.init(keys(n), ours[:n], theirs, images())
        totals.append(flops(crowd.update, members, theirs, images()))
    once = flops(jax.jit(partial(stage.teach, None)), theirs, images())
    one, all_of_them = totals
    # Even less: students also share what the losses compute from the features.
    assert all_of_them <= N * one - (N - 1) * once
    assert once > one / 20


OPERATION = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def test_devices_tell_each_other_the_teachers_features_and_nothing_else(tmp_path):
    """Each device has one student and an eighth of the teacher's work."""
    stage, ours, theirs = made(hj.Adjustable(1.0))
    mesh = hj.data_mesh()
    crowd = hj.population(stage, mesh.size, mesh=mesh)
    members = crowd.init(keys(mesh.size), ours[0], theirs, images())
    compiled = crowd.update.lower(members, theirs, images()).compile()
    found = Counter()
    for line in compiled.as_text().splitlines():
        if match := OPERATION.search(line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found[match[2], tuple(map(int, shape.split(",")))] += 1
    output, hint = (BATCH, CLASSES), (BATCH, 5, 5, WIDTH)
    assert found == {("all-gather", output): 1, ("all-gather", hint): 1}

    state = crowd.states(members)[0]
    teach = jax.jit(partial(stage.teach, None))
    once = flops(teach, theirs, images())
    one = flops(jax.jit(stage.step), state, teach(theirs, images()), images())
    assert once > one / 20
    assert compiled.cost_analysis()["flops"] == pytest.approx(one + once / 8, rel=1e-3)

    kernel = members.params["student"]["conv"]["kernel"]
    assert [s.data.shape[0] for s in kernel.addressable_shards] == [1] * 8
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, members)
    again, _ = checkpoints.restore(members)
    checkpoints.close()
    for read, written in zip(*map(jax.tree.leaves, (again, members)), strict=True):
        assert read.sharding == written.sharding
        assert (read == written).all()
    members, _ = crowd.update(again, place(theirs, mesh), images())
    assert members.step.tolist() == [1] * 8


@pytest.mark.quick
def test_keys_and_students_are_as_many():
    stage, ours, theirs = made(1.0)
    crowd = hj.population(stage, N)
    two = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(
        ValueError, match="population: expected 4 keys and 4 students, got 2"
    ):
        crowd.init(two, ours, theirs, images())
    state = stage.init(two[0], ours[0], theirs, images())
    with pytest.raises(ValueError, match="population: expected 4 states, got 1"):
        crowd.members([state])
    with pytest.raises(ValueError, match="population: expected n to be an integer"):
        hj.population(stage, 0)


@pytest.mark.quick
def test_devices_have_equal_shares_of_students_and_of_a_batch():
    stage, ours, theirs = made(1.0)
    mesh = hj.data_mesh()
    with pytest.raises(ValueError, match=r"multiple of the 8 devices, got 12. Use 16,"):
        hj.population(stage, 12, mesh=mesh)
    crowd = hj.population(stage, 8, mesh=mesh)
    members = crowd.init(keys(8), ours[0], theirs, images())
    short = {name: entry[:6] for name, entry in images().items()}
    with pytest.raises(ValueError, match="batch: .*Use a multiple of 8, such as 8"):
        crowd.update(members, theirs, short)
    crowd = hj.population(made(1.0, mesh)[0], 8, mesh=mesh)
    with pytest.raises(
        ValueError, match="expected a stage on one device, got one on 8"
    ):
        crowd.init(keys(8), ours[0], theirs, images())


@pytest.mark.quick
def test_only_adjustable_weights_can_be_set():
    stage, ours, theirs = made(hj.Adjustable(1.0))
    state = stage.init(keys()[0], ours[0], theirs, images())
    with pytest.raises(
        ValueError, match="reweighted: .*got 'hnt'. Nearest: hint; give"
    ):
        hj.reweighted(state, hnt=2.0)
    with pytest.raises(ValueError, match="reweighted: expected a finite weight >= 0"):
        hj.reweighted(state, hint=-1.0)
    new = hj.reweighted(state, hint=2)
    assert new.memory["weights"] == {"hint": 2}
    assert state.memory["weights"] == {"hint": 1}
    assert new.memory["weights"]["hint"].dtype == state.memory["weights"]["hint"].dtype
    # The next stage begins with its own weight, not with that of the stage before.
    carried = stage.init(keys()[0], ours[0], theirs, images(), carry=new)
    assert carried.memory["weights"] == {"hint": 1}
    fixed = made(1.0)[0].init(keys()[0], ours[0], theirs, images())
    with pytest.raises(
        ValueError, match="reweighted: .*Nearest: none; give its weight"
    ):
        hj.reweighted(fixed, hint=2.0)
