"""Every method gives the same results on one device and on eight.

The eight devices share the batch, or, as 2 x 4, the parameters too. Programs have only
the collectives that they need.
"""

import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import hintjax as hj
from hintjax.sharding import Layout, make_mesh

KEY = jax.random.key(0)
BATCH, CLASSES, SIZE, SIDE = 24, 4, 37, 8
LABELS = np.arange(SIZE, dtype=np.int32) % CLASSES
PAIRS = [("stage1", "stage1"), ("stage2", "stage2")]
STEPS = 3


class Block(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), (self.stride,) * 2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.relu(x)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = Block(self.width, 1, name="stage1")(x, train)
        x = Block(2 * self.width, 2, name="stage2")(x, train)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


def images(seed=0):
    generator = np.random.default_rng(seed)
    index = generator.permutation(SIZE)[:BATCH]
    index[5] = index[3]  # twice, on two devices
    return {
        "image": generator.normal(size=(BATCH, SIDE, SIDE, 3)),
        "label": LABELS[index],
        "index": index.astype(np.int32),
        # The number of examples that count differs between devices.
        "where": np.arange(BATCH) % 5 > 0,
    }


def made(width, seed):
    network = hj.linen(Net(width))
    shapes = jax.eval_shape(network.init, KEY, images()["image"])
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return generator.uniform(0.5, 1.5, leaf.shape)
        return 0.4 * generator.normal(size=leaf.shape)

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)
NORMED = partial(hj.regressors.conv, batch_norm=True, activation=nn.relu)


def uncoupled(mesh):
    """Methods that treat each example alone."""
    return hj.objective(
        task=TASK,
        kd=hj.kd(),
        hint=hj.fitnets(PAIRS, regressor=NORMED),
        at=hj.weighted(hj.attention_transfer(PAIRS), 100.0),
        fsp=hj.fsp(hj.flows(PAIRS), regressor=hj.regressors.linear),
        review=hj.review(PAIRS),
    )


def contrastive(mesh):
    return hj.objective(
        task=TASK,
        own=hj.crd(
            ("stage2", "stage2"),
            negatives=hj.AnchorNegatives(NEGATIVES),
            feature_dim=WIDTH,
            mesh=mesh,
        ),
        shared=hj.crd(
            ("stage2", "stage1"),
            negatives=hj.SharedNegatives(SHARED),
            feature_dim=WIDTH,
            relax=True,
            mesh=mesh,
        ),
    )


def hints(mesh):
    return hj.objective(
        hint=hj.fitnets(PAIRS[:1], regressor=NORMED),
        fsp=hj.fsp(hj.flows(PAIRS), regressor=hj.regressors.linear),
    )


OBJECTIVES = {"uncoupled": uncoupled, "contrastive": contrastive, "hints": hints}
HEAD = (8, CLASSES)
# CRD sends its indices to all devices, and its embeddings too if each anchor has its
# own negatives; then scores and the sums of their gradients come back. Shared negatives
# are summed. Other rows are requested from their device, and sent to it.
NEGATIVES, SHARED, WIDTH = 5, 11, 6
OWN, ROWS = BATCH // 8, -(-SIZE // 8)
BROUGHT = {
    "uncoupled": set(),
    "hints": set(),
    "contrastive": {(BATCH,), (BATCH, WIDTH)},
}
SENT = {
    "uncoupled": set(),
    "hints": set(),
    "contrastive": {
        *(("all-to-all", (OWN, *shape)) for shape in ((), (WIDTH,), (ROWS,))),
        ("reduce-scatter", (OWN, WIDTH)),
    },
}
TOGETHER = {"uncoupled": 0, "hints": 0, "contrastive": 2}


class Ran(NamedTuple):
    state: hj.State
    reported: list
    compiled: jax.stages.Compiled
    teacher: hj.Variables


def layouts():
    return {
        "data": Layout(make_mesh()),
        "fsdp": Layout(make_mesh(data=2, fsdp=4), at_least=64),
    }


def run(make, objective, layout):
    """Runs some steps and an evaluation."""
    mesh = None if layout is None else layout.mesh
    student, ours = made(4, 0)
    teacher, theirs = made(8, 1)
    optimizer = optax.sgd(0.05, momentum=0.9)
    stage = make(student, teacher, objective(mesh), optimizer, mesh=layout)
    state = double(stage.init(KEY, ours, theirs, images(), hj.Data(LABELS)))
    update = stage.update.lower(state, theirs, images()).compile()
    reported = []
    for seed in range(STEPS):
        # An executable needs its arguments on the devices that it was compiled for.
        (_, where, batch), _ = update.input_shardings
        placed = jax.device_put((theirs, images(seed)), (where, batch))
        state, metrics = update(state, *placed)
        reported.append(metrics)
    if objective is contrastive:  # evaluation has no positives in the bank
        reported.append(stage.evaluate(state, theirs, images(7)))
    return Ran(state, reported, update, theirs)


@pytest.fixture(scope="module", params=OBJECTIVES)
def runs(request):
    """The kind of objective, and its runs by layout; each is compiled once."""
    make = hj.hint_stage if request.param == "hints" else hj.distillation_stage
    with jax.enable_x64(True):
        objective = OBJECTIVES[request.param]
        named = {"one": None, **layouts()}
        yield (
            request.param,
            {name: run(make, objective, layout) for name, layout in named.items()},
        )


def numbers(ran):
    """All floats except the rows that pad a bank."""

    def read(leaf):
        x = np.asarray(leaf)
        return x[:SIZE] if x.shape[:1] == (-(-SIZE // 8) * 8,) else x

    state = ran.state._replace(key=None)
    return jax.tree.map(read, (state, ran.reported))


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_eight_devices_give_the_numbers_of_one(runs, layout):
    _, ran = runs
    want, got = numbers(ran["one"]), numbers(ran[layout])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want)
    assert want[0].step == STEPS
    assert sum(leaf.dtype == np.float64 for leaf in jax.tree.leaves(want)) > 30


def test_large_parameters_are_stored_in_shares(runs):
    _, ran = runs
    params = ran["fsdp"].state.params
    kernel = params["student"]["stage2"]["conv"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (3, 3, 4, 2)
    assert params["student"]["head"]["kernel"].sharding.is_fully_replicated
    momenta = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            ran["fsdp"].state.opt_state
        )
        if jax.tree_util.keystr(path).endswith("['stage2']['conv']['kernel']")
    ]
    assert [m.sharding for m in momenta] == [kernel.sharding]


OPERATION = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(compiled):
    """Counts the collectives by kind and by the shape of the output."""
    found = Counter()
    for line in compiled.as_text().splitlines():
        if match := OPERATION.search(line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                shape = tuple(int(n) for n in shape.split(",") if n)
                found[match[2], dtype, shape] += 1
    return found


def unread(sharding):
    """Is it the sharding of an argument that the compiled step does not read?"""
    return sharding is None


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_weights_are_gathered_and_gradients_summed_and_no_more(runs, layout):
    kind, ran = runs
    state, compiled = ran[layout].state, ran[layout].compiled
    found = collectives(compiled)
    (ours, theirs, _), _ = compiled.input_shardings
    in_shares = [
        leaf
        for leaf, sharding in zip(
            jax.tree.leaves((state.params, ran[layout].teacher.params)),
            jax.tree.leaves((ours.params, theirs.params), is_leaf=unread),
            strict=True,
        )
        if not unread(sharding) and not sharding.is_fully_replicated
    ]
    assert bool(in_shares) == (layout == "fsdp")
    # Except for weights, only CRD's bank sends matrices between devices.
    gathered, summed, others = Counter(), Counter(), set()
    for (operation, _, shape), count in found.items():
        if operation == "all-gather" and shape not in BROUGHT[kind]:
            gathered[shape] += count
        elif operation == "all-reduce" and len(shape) > 1:
            summed[tuple(sorted(shape))] += count  # a kernel may be transposed
        elif operation != "all-reduce":
            others.add((operation, shape))
    assert gathered == Counter(leaf.shape for leaf in in_shares)
    # The hint stage sums no gradient of a parameter that it does not train.
    trained = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    if kind == "hints":
        trained = [leaf for leaf in trained if leaf.shape != HEAD]
    expected = Counter(tuple(sorted(leaf.shape)) for leaf in trained)
    expected[tuple(sorted((SHARED, WIDTH)))] += TOGETHER[kind]
    assert summed == +expected
    assert others == SENT[kind] | {("all-gather", shape) for shape in BROUGHT[kind]}
