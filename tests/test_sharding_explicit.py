"""Meshes as `jax.make_mesh` makes them, with Explicit axes, give the same programs."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hintjax as hj
from hintjax import memory
from hintjax.sharding import (
    Layout,
    automatic,
    from_process,
    over_batch,
    place,
    replicated,
)

KEY = jax.random.key(0)
PAIR = ("conv", "conv")
BATCH = {
    "image": np.ones((8, 8, 8, 1), np.float32),
    "label": np.arange(8, dtype=np.int32) % 3,
    "index": np.arange(8, dtype=np.int32),
}
DATA = hj.Data(np.arange(16, dtype=np.int32) % 3)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def explicit(**sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[: 2 * len(sizes)]
    )


NETWORK = hj.linen(Net())
SHAPES = jax.eval_shape(NETWORK.init, KEY, BATCH["image"])
VARIABLES = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), SHAPES)


def distill(mesh, of=lambda mesh: mesh):
    shared = hj.methods.SharedNegatives(8)
    method = hj.objective(
        kd=hj.kd(),
        hint=hj.fitnets([PAIR]),
        crd=hj.crd(PAIR, negatives=shared, mesh=mesh),
    )
    how = {"accumulate": 2, "rates": {"conv": 0.5}}
    optimizer = optax.adamw(1e-3)
    return hj.distillation_stage(
        NETWORK, NETWORK, method, optimizer, mesh=of(mesh), **how
    )


def hint(mesh, of=lambda mesh: mesh):
    method = hj.fitnets([PAIR])
    return hj.hint_stage(NETWORK, NETWORK, method, optax.sgd(0.1), mesh=of(mesh))


def program(stage):
    state = jax.eval_shape(stage.init, KEY, SHAPES, SHAPES, BATCH, DATA)
    return stage.update.lower(state, SHAPES, BATCH).as_text()


@pytest.mark.quick
@pytest.mark.parametrize("make", [distill, hint])
def test_a_stage_has_the_same_program(make):
    mesh = explicit(data=2, fsdp=2)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    wanted = program(make(automatic(mesh)))
    assert program(make(mesh)) == wanted
    assert program(make(mesh, Layout)) == wanted


@pytest.mark.quick
def test_the_mesh_alone_changes_where_axes_are_explicit():
    mesh = explicit(data=2)
    auto = automatic(mesh)
    assert auto.axis_types == (AxisType.Auto,)
    assert (auto.devices == mesh.devices).all() and auto.axis_names == ("data",)
    assert automatic(auto) is auto
    assert over_batch(mesh) == over_batch(auto)
    assert replicated(mesh) == replicated(auto)


def test_arrays_on_such_a_mesh_train():
    """Also arrays that the user has placed there, with shardings of their own."""
    mesh = explicit(data=2)
    there = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(BATCH, there)
    ours = jax.device_put(VARIABLES, NamedSharding(mesh, PartitionSpec()))
    stage, found = hint(mesh), []
    for batch, student, teacher in (
        (from_process(BATCH, mesh), VARIABLES, place(VARIABLES, mesh)),
        (placed, ours, ours),
    ):
        state = stage.init(KEY, student, teacher, batch)
        state, metrics = stage.update(state, teacher, batch)
        found.append(float(metrics["loss"]))
        assert state.step.sharding.mesh == automatic(mesh)
    assert found[0] == found[1] > 0
    with jax.set_mesh(mesh):
        state = stage.init(KEY, VARIABLES, VARIABLES, BATCH)
        _, metrics = stage.update(state, VARIABLES, BATCH)
    assert metrics["loss"] == found[0]


@pytest.mark.quick
def test_a_population_is_divided_over_such_a_mesh():
    stage = hj.hint_stage(NETWORK, NETWORK, hj.fitnets([PAIR]), optax.sgd(0.1))
    texts = []
    for mesh in (explicit(data=2), automatic(explicit(data=2))):
        crowd = hj.population(stage, 2, mesh=mesh)
        members = jax.eval_shape(
            lambda: jax.tree.map(
                lambda leaf: (
                    jnp.stack([jnp.zeros(leaf.shape)] * 2)
                    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                    else jax.random.split(KEY)
                ),
                jax.eval_shape(stage.init, KEY, SHAPES, SHAPES, BATCH),
            )
        )
        texts.append(crowd.update.lower(members, SHAPES, BATCH).as_text())
    assert texts[0] == texts[1]
    assert re.search("shard", texts[0])


def test_arrays_on_such_a_mesh_train_a_population_and_a_stage_of_one_device():
    mesh, keys = explicit(data=2), list(jax.random.split(KEY, 2))
    there = jax.device_put(VARIABLES, NamedSharding(mesh, PartitionSpec()))
    placed = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
    stage = hj.hint_stage(NETWORK, NETWORK, hj.fitnets([PAIR]), optax.sgd(0.1))
    crowd, found = hj.population(stage, 2, mesh=mesh, together=False), []

    def crowded(variables, batch):
        members = crowd.init(keys, variables, variables, batch)
        members, metrics = crowd.update(members, variables, batch)
        assert len(crowd.states(members)) == 2
        return np.asarray(metrics["loss"])[0]

    def alone(variables, batch):
        state = stage.init(keys[0], variables, variables, batch)
        stage.evaluate(state, variables, batch)
        return stage.update(state, variables, batch)[1]["loss"]

    for trained in (alone, crowded):
        found.append(trained(VARIABLES, BATCH))
        found.append(trained(there, placed))
        with jax.set_mesh(mesh):
            found.append(trained(there, placed))
            keys[0] = jax.random.split(KEY, 2)[0]
            found.append(trained(VARIABLES, BATCH))
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


@pytest.mark.quick
def test_a_bank_is_split_over_such_a_mesh():
    mesh = explicit(data=2)
    bank = memory.init(KEY, 8, 4, mesh)
    index, vectors = jnp.arange(4), jnp.ones((4, 4))
    plain = memory.update(bank, index, vectors, vectors)
    there = memory.update(bank, index, vectors, vectors, mesh=mesh)
    np.testing.assert_allclose(there.student, plain.student, rtol=1e-6)
