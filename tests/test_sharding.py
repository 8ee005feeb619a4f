"""Eight devices give the same results as one, and each does a part of the work."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import hintjax as hj
from hintjax.sharding import over_batch, replicated

KEY = jax.random.key(0)
BATCH, CLASSES = 16, 3
PAIRS = [("conv1", "conv1"), ("conv2", "conv2")]


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in (1, 2):
            x = nn.Conv(self.width, (3, 3), name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
            x = nn.relu(x)
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(CLASSES, name="head")(x)


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def images(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(BATCH, 8, 8, 1)),
        "label": generator.integers(0, CLASSES, BATCH).astype(np.int32),
        # The number of examples that count differs between devices.
        "where": np.arange(BATCH) % 5 > 0,
    }


def made(width, seed):
    network = hj.linen(Net(width))
    shapes = jax.eval_shape(network.init, KEY, images()["image"])
    generator = np.random.default_rng(seed)
    draw = jax.tree.map(lambda x: generator.uniform(0.1, 0.6, x.shape), shapes)
    return network, draw


def normed(student, teacher):
    return hj.regressors.conv(student, teacher, batch_norm=True, activation=nn.relu)


def image(batch):
    """The inputs, with a count of how often they are traced."""
    image.traced += 1
    return batch["image"]


image.traced = 0


def hint(mesh):
    student, teacher = made(4, 0)[0], made(6, 1)[0]
    method = hj.objective(hint=hj.fitnets(PAIRS, regressor=normed))
    optimizer = optax.sgd(0.05, momentum=0.9)
    return hj.hint_stage(student, teacher, method, optimizer, mesh=mesh, inputs=image)


def distillation(mesh):
    student, teacher = made(4, 0)[0], made(6, 1)[0]
    method = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        kd=hj.kd(),
        hint=hj.fitnets(PAIRS, regressor=normed),
        at=hj.weighted(hj.attention_transfer(PAIRS), 100.0),
    )
    optimizer = optax.sgd(0.05, momentum=0.9)
    return hj.distillation_stage(
        student,
        teacher,
        method,
        optimizer,
        rates={"conv1": 0.5},
        mesh=mesh,
        inputs=image,
    )


def test_eight_devices_give_the_numbers_of_one():
    """Dropout and learning rates by layer; the step is traced once for all updates."""
    results = []
    with jax.enable_x64(True):
        ours, theirs = made(4, 0)[1], made(6, 1)[1]
        for stage in (distillation(None), distillation(hj.data_mesh())):
            state = double(stage.init(KEY, ours, theirs, images()))
            reported, traced = [], []
            for seed in range(4):
                state, metrics = stage.update(state, theirs, images(seed))
                reported.append(metrics)
                traced.append(image.traced)
            assert len(set(traced)) == 1
            reported.append(stage.evaluate(state, theirs, images(7)))
            results.append((state._replace(key=None), reported))
    one, eight = results
    assert one[0].step == 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        *jax.tree.map(np.asarray, (one, eight)),
    )
    leaves = jax.tree.leaves(eight)
    assert all(len(x.sharding.device_set) == 8 for x in leaves)
    assert all(x.sharding.is_fully_replicated for x in leaves)
    assert sum(x.dtype == jnp.float64 for x in leaves) > 30


def test_each_device_does_its_share():
    ours, theirs = made(4, 0)[1], made(6, 1)[1]
    compiled = []
    for mesh in (None, hj.data_mesh()):
        stage = hint(mesh)
        state = stage.init(KEY, ours, theirs, images())
        lowered = stage.update.lower(state, theirs, images())
        # The same work, compiled faster; this program never runs.
        compiled.append(lowered.compile({"xla_backend_optimization_level": 0}))
    one, eight = (c.cost_analysis()["flops"] for c in compiled)
    assert eight < one / 6
    (state, teacher, batch), _ = compiled[1].input_shardings
    assert batch["image"].spec == batch["where"].spec == PartitionSpec("data")
    assert all(s.is_fully_replicated for s in jax.tree.leaves((state, teacher)))


@pytest.mark.quick
def test_a_batch_that_cannot_be_split_is_refused_and_nothing_is_lost():
    _, ours = made(4, 0)
    _, theirs = made(6, 1)
    stage = distillation(hj.data_mesh())
    batch = {name: jnp.asarray(x) for name, x in images().items()}
    state = stage.init(KEY, ours, theirs, batch)
    short = {name: x[:6] for name, x in batch.items()}
    with pytest.raises(ValueError, match="multiple of 8, such as 8"):
        stage.update(state, theirs, short)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.quick
def test_the_mesh_has_one_automatic_axis():
    mesh = hj.data_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)
    assert mesh.size == jax.device_count() == 8
    two = hj.data_mesh(jax.devices()[2:4])
    assert list(two.devices) == jax.devices()[2:4]
    x = np.arange(8.0).reshape(4, 2)
    assert jax.device_put(x, replicated(two)).sharding.is_fully_replicated
    split = jax.device_put(x, over_batch(two))
    assert [s.data.shape for s in split.addressable_shards] == [(2, 2)] * 2
