"""Meshes and rules: the placement of parameters, and the rules that are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hintjax as hj
from hintjax.sharding import (
    Layout,
    alike,
    batch_axes,
    check_batch,
    check_rules,
    make_mesh,
    over_batch,
    place,
    shares,
    stored,
    whole,
)

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
P = PartitionSpec


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(shardings):
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def test_a_mesh_has_the_axes_that_are_given_a_size():
    assert make_mesh().shape == {"data": 8}
    assert make_mesh(fsdp=4).shape == {"data": 2, "fsdp": 4}
    assert make_mesh(data=2, fsdp=2, model=2).shape == {
        "data": 2,
        "fsdp": 2,
        "model": 2,
    }
    two = make_mesh(model=2, devices=jax.devices()[:2])
    assert two.shape == {"data": 1, "model": 2}
    assert set(make_mesh(fsdp=4, model=2).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"data": 4}, {"fsdp": 16}, {"data": 2, "model": 2}]
)
def test_sizes_make_up_the_devices(sizes):
    with pytest.raises(ValueError, match="make_mesh: expected axes that make up 8"):
        make_mesh(**sizes)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    assert batch_axes(mesh) == ("data", "fsdp")
    assert shares(mesh) == 4
    assert over_batch(mesh).spec == P(("data", "fsdp"))
    assert over_batch(make_mesh()).spec == P("data")
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="mesh: expected a mesh with an axis data or"):
        batch_axes(other)


@pytest.mark.parametrize(
    "size, sizes", [(6, "such as 8"), (20, "such as 16 or 24"), (0, "such as 8")]
)
def test_batches_that_cannot_be_shared_are_told_what_would_do(size, sizes):
    batch = {"image": shape(16, 2), "label": shape(size)}
    with pytest.raises(
        ValueError, match=rf"'label' of shape \({size},\).*{sizes}, or fill it up"
    ):
        check_batch(batch, make_mesh(data=2, fsdp=4))
    check_batch({"image": shape(16, 2)}, make_mesh())


PARAMS = {
    "student": {
        "conv": {"kernel": shape(3, 3, 16, 24), "bias": shape(24)},
        "head": {"kernel": shape(24, 10), "bias": shape(10)},
        "odd": shape(99, 7),
    },
}


def test_large_parameters_are_split_along_their_largest_axis_that_divides():
    layout = Layout(make_mesh(data=2, fsdp=4), at_least=200)
    assert specs(stored(layout, PARAMS)) == {
        "student": {
            "conv": {"kernel": P(None, None, None, "fsdp"), "bias": P()},
            "head": {"kernel": P("fsdp"), "bias": P()},
            "odd": P(),
        },
    }
    for mesh in (make_mesh(), make_mesh(fsdp=1)):
        everywhere = jax.tree.leaves(stored(layout._replace(mesh=mesh), PARAMS))
        assert all(sharding.is_fully_replicated for sharding in everywhere)


def test_the_first_rule_that_is_found_counts():
    rules = {
        "head/kernel$": P(None, "model"),
        "head/": P(),
        "^student/conv/kernel": P(None, None, "fsdp", "model"),
    }
    layout = Layout(make_mesh(data=1, fsdp=4, model=2), rules, at_least=1)
    got = stored(layout, PARAMS)
    assert specs(got) == {
        "student": {
            "conv": {"kernel": P(None, None, "fsdp", "model"), "bias": P("fsdp")},
            "head": {"kernel": P(None, "model"), "bias": P()},
            "odd": P(),
        },
    }
    # In a step, axes that were split as the batch is are whole; others stay split.
    computed = specs(whole(got))["student"]
    assert computed["conv"]["kernel"] == P(None, None, None, "model")
    assert computed["conv"]["bias"] == P(None)


@pytest.mark.parametrize(
    "rules, complaint",
    [
        (
            {"heed/kernel": P()},
            "matches no parameter.*nearest are .*'student/head/kernel'",
        ),
        ({"head/bias": P("rows")}, r"expected axes among \('data', 'fsdp'\)"),
        ({"head/bias": P(None, "fsdp")}, "at most the 1 axes of 'student/head/bias'"),
        ({"odd": P("fsdp")}, r"divide 'student/odd' evenly.* over 4 devices"),
    ],
)
def test_rules_that_cannot_be_followed(rules, complaint):
    layout = Layout(make_mesh(data=2, fsdp=4), rules)
    with pytest.raises(ValueError, match=f"^layout.*{complaint}"):
        check_rules(layout, PARAMS)
        stored(layout, PARAMS)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(1e-3), optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))],
)
def test_the_optimizers_state_lives_where_its_parameters_do(optimizer):
    mesh = make_mesh(data=2, fsdp=4)
    shardings = stored(Layout(mesh, at_least=200), PARAMS)
    state = jax.eval_shape(optimizer.init, PARAMS)
    placed = alike(shardings, PARAMS, state, mesh)
    found = [
        sharding.spec
        for sharding in jax.tree.leaves(placed)
        if not sharding.is_fully_replicated
    ]
    moments = len(found) // 2
    assert moments in (1, 2)
    assert found == [P(None, None, None, "fsdp"), P("fsdp")] * moments


def test_what_is_no_more_of_a_parameters_shape_is_everywhere():
    mesh = make_mesh(data=2, fsdp=4)
    shardings = stored(Layout(mesh, at_least=200), PARAMS)
    rows = jax.tree.map(lambda leaf: shape(leaf.shape[0]), PARAMS)  # as of Adafactor
    placed = jax.tree.leaves(alike(shardings, PARAMS, {"rows": rows}, mesh))
    assert all(sharding.is_fully_replicated for sharding in placed)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="first")(x.reshape(len(x), -1)))
        return nn.Dense(4, name="head")(x)


def test_a_stage_follows_rules_and_layers_may_be_split_over_model():
    """The results are the same with the head's outputs on different devices."""
    network = hj.linen(Net(), call=lambda module, x, train: module(x))
    batch = {
        "image": np.random.default_rng(0).normal(size=(8, 2, 2, 1)).astype(np.float32),
        "label": np.arange(8, dtype=np.int32) % 4,
    }
    ours, theirs = (
        jax.jit(network.init)(jax.random.key(i), batch["image"]) for i in (0, 1)
    )
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels), kd=hj.kd()
    )
    rules = {
        "head/kernel$": P(None, "model"),
        "^teacher/first/kernel": P("fsdp"),
    }
    losses = []
    for layout in (None, Layout(make_mesh(fsdp=2, model=2), rules)):
        stage = hj.distillation_stage(
            network, network, method, optax.sgd(0.1), mesh=layout
        )
        state = stage.init(KEY, ours, theirs, batch)
        for _ in range(2):
            state, metrics = stage.update(state, theirs, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    head = state.params["student"]["head"]["kernel"]
    assert isinstance(head.sharding, NamedSharding)
    assert head.sharding.spec == P(None, "model")
    lowered = stage.update.lower(state, theirs, batch)
    (_, teacher, _), _ = lowered.compile().input_shardings
    assert teacher.params["first"]["kernel"].spec == P("fsdp")
    for mesh in (layout, layout.mesh):
        placed = place(theirs, mesh)
        stage = hj.distillation_stage(network, network, method, optax.sgd(1), mesh=mesh)
        state = stage.init(KEY, ours, placed, batch)
        (_, wanted, _), _ = (
            stage.update.lower(state, placed, batch).compile().input_shardings
        )
        assert jax.tree.map(lambda leaf: leaf.sharding, placed) == wanted
    nowhere = Layout(make_mesh(), {"haed": P()})
    stage = hj.distillation_stage(network, network, method, optax.sgd(1), mesh=nowhere)
    with pytest.raises(ValueError, match="layout: .*'haed'.*student/head"):
        stage.init(KEY, ours, theirs, batch)
