"""An update from micro-batches is that of the whole batch, in less memory."""

import functools
import math
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.sharding import Layout
from hintjax.stages import accumulation

KEY = jax.random.key(0)
BATCH, CLASSES = 24, 3
PAIR = ("hidden", "hidden")
TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)


class Net(nn.Module):
    """Each example for itself; with a norm, only while it is not in training."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(
                x
            )
        x = nn.Dense(5, name="hidden")(nn.relu(x).mean((1, 2)))
        return nn.Dense(CLASSES, name="head")(nn.relu(x))


def images(seed=0, size=BATCH):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(size, 4, 4, 1)),
        "label": generator.integers(0, CLASSES, size).astype(np.int32),
        # Unlike numbers of examples that count in the micro-batches, and in one none.
        "where": (np.arange(size) % 4 > 0) & (np.arange(size) % 5 > 0),
    }


def made(norm, seed):
    network = hj.linen(Net(norm))
    shapes = jax.eval_shape(network.init, KEY, images()["image"])
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return generator.uniform(0.5, 1.5, leaf.shape)
        return generator.normal(size=leaf.shape)

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


def double(tree):
    def one(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def everything():
    return hj.objective(
        task=TASK,
        kd=hj.kd(),
        hint=hj.weighted(hj.fitnets([PAIR]), optax.linear_schedule(2.0, 0.0, 4)),
    )


def begun(method, *, norm=False, optimizer=None, **how):
    student, ours = made(norm, 0)
    teacher, theirs = made(True, 1)
    optimizer = optimizer or optax.sgd(0.1, momentum=0.9)
    stage = hj.distillation_stage(student, teacher, method, optimizer, **how)
    return stage, double(stage.init(KEY, ours, theirs, images())), theirs


def ran(method, *, steps=2, batch=images, **how):
    return trained(*begun(method, **how), steps=steps, batch=batch)


def trained(stage, state, theirs, *, steps=2, batch=images):
    reported = []
    for step in range(steps):
        state, metrics = stage.update(state, theirs, batch(step))
        reported.append(metrics)
    for metrics in reported:
        metrics.pop("hint/r2", None)  # a ratio of means is no mean
    return jax.device_get((state._replace(key=None), reported))


def close(got, want):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want
    )


@pytest.fixture(autouse=True, scope="module")
def doubles():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def whole(doubles):
    return ran(everything())


@pytest.fixture(params=[True, False], ids=["unrolled", "scan"])
def form(request, monkeypatch):
    """As on a CPU, and as elsewhere."""
    monkeypatch.setattr(accumulation, "unrolled", lambda layout: request.param)


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_give_the_update_and_the_metrics_of_the_whole(whole, form, count):
    """With a mask that leaves one micro-batch of four empty."""
    assert not images()["where"][::4].any()
    close(ran(everything(), accumulate=count), whole)


def test_the_hint_stage_takes_micro_batches_too():
    (student, ours), (teacher, theirs) = made(False, 0), made(True, 1)
    method, states = hj.objective(hint=hj.fitnets([PAIR])), []
    for count in (1, 3):
        stage = hj.hint_stage(
            student, teacher, method, optax.sgd(0.1), accumulate=count
        )
        state = double(stage.init(KEY, ours, theirs, images()))
        state, metrics = stage.update(state, theirs, images())
        states.append(jax.device_get((state._replace(key=None), metrics["loss"])))
    close(*states)
    np.testing.assert_array_equal(
        states[1][0].params["student"]["head"]["kernel"], ours.params["head"]["kernel"]
    )


def test_a_report_and_an_evaluation_are_those_of_the_whole():
    found = []
    for count in (1, 2):
        stage, state, theirs = begun(everything(), accumulate=count)
        found.append(
            (
                stage.report(state, theirs, images()),
                stage.evaluate(state, theirs, images(size=7)),  # of any size
            )
        )
    close(*found)


def test_statistics_and_memory_go_from_each_micro_batch_to_the_next():
    def remember(params, memory, student, teacher, batch, context):
        last = memory["last"] * 10 + batch["label"][0]
        return student.output.sum(-1), {"last": last}, {}

    wants = hj.Wants(output=True)
    method = hj.Method(
        wants, hj.Wants(), lambda *_: ({}, {"last": jnp.zeros(())}), remember
    )
    batch = {name: value for name, value in images().items() if name != "where"}
    batch["label"] = np.arange(BATCH, dtype=np.int32)
    stage, state, theirs = begun(method, norm=True, accumulate=3)
    mean = jax.device_get(state.state["batch_stats"]["norm"]["mean"])
    conv = jax.device_get({"params": state.params["student"]["conv"]})
    state, _ = stage.update(state, theirs, batch)
    assert state.memory["last"] == 12  # the labels 0, 1, 2 of the first examples
    for i in range(3):
        maps = nn.Conv(4, (3, 3)).apply(conv, batch["image"][i::3])
        mean = 0.5 * mean + 0.5 * maps.mean((0, 1, 2))
    close(state.state["batch_stats"]["norm"]["mean"], mean)


@pytest.mark.parametrize("count", [1, 2])
def test_each_micro_batch_has_its_own_key(count):
    def draw(params, memory, student, teacher, batch, context):
        drawn = jax.random.uniform(context.key)
        return student.output.sum(-1), memory, {"drawn": drawn}

    method = hj.Method(hj.Wants(output=True), hj.Wants(), lambda *_: ({}, {}), draw)
    stage, state, theirs = begun(method, accumulate=count)
    key, metrics = jnp.array(state.key), []
    for seed in range(2):
        state, found = stage.update(state, theirs, images(seed))
        metrics.append(found["drawn"])

    def drawn(key, step):
        return jax.random.uniform(jax.random.split(jax.random.fold_in(key, step))[1])

    keys = [key] if count == 1 else [jax.random.fold_in(key, i) for i in range(2)]
    each = np.float64([[drawn(key, step) for key in keys] for step in range(2)])
    assert len(np.unique(each)) == 2 * count
    shares = [
        images(s)["where"][i::count].sum() for s in range(2) for i in range(count)
    ]
    shares = np.reshape(shares, (2, count))
    shares = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(metrics, (shares * each).sum(1), rtol=1e-6)


def test_one_micro_batch_that_is_not_finite_skips_the_update():
    def broken(seed):
        batch = images(seed)
        batch["image"][1] = np.nan if seed == 1 else batch["image"][1]
        return batch

    got, reported = ran(everything(), steps=3, accumulate=2, batch=broken)
    assert got.skipped.total == 1
    assert [np.isnan(metrics["loss"]) for metrics in reported] == [False, True, False]
    stage, state, theirs = begun(everything(), accumulate=2)
    state, _ = stage.update(state, theirs, images(0))
    state = state._replace(step=state.step + 1)
    state, _ = stage.update(state, theirs, images(2))
    state = jax.device_get(state._replace(key=None, skipped=got.skipped))
    jax.tree.map(np.testing.assert_array_equal, got, state)


def test_only_one_micro_batch_needs_its_activations_at_a_time(form):
    def memory(count):
        stage, state, theirs = begun(everything(), accumulate=count)
        batch = images(size=32 * BATCH)
        compiled = stage.update.lower(state, theirs, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(4) < 0.7 * memory(1)


# On a mesh

OPERATION = re.compile(
    r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(stage, state, theirs):
    """How many numbers each kind of collective moves."""
    text = stage.update.lower(state, theirs, images()).compile().as_text()
    found = Counter()
    for line in text.splitlines():
        if match := OPERATION.search(line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found[match[2]] += math.prod(int(n) for n in shape.split(",") if n)
    return found


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda: Layout(hj.data_mesh()), id="data"),
        pytest.param(
            lambda: Layout(hj.make_mesh(data=2, fsdp=4), at_least=16), id="fsdp"
        ),
    ],
)
def test_on_a_mesh_no_example_moves(whole, form, layout):
    moved = []
    for count in (1, 3):
        start = begun(everything(), mesh=layout(), accumulate=count)
        moved.append(collectives(*start))
        close(trained(*start), whole)
    one, three = moved
    assert three.keys() == one.keys()
    # Weights are gathered once for all; of what is summed there is more.
    assert all(three[kind] == one[kind] for kind in one if kind != "all-reduce")


# Errors


@pytest.mark.parametrize("count", [0, -1])
def test_counts_that_are_none_are_refused(count):
    with pytest.raises(ValueError, match="accumulate to be an integer >= 1, got"):
        begun(everything(), accumulate=count)


@pytest.mark.parametrize(
    "count, mesh, sizes",
    [
        (5, False, "5 micro-batches can .* Use a multiple of 5, such as 20 or 25"),
        (2, True, "2 micro-batches on 8 devices .* multiple of 16, such as 16 or 32"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes(count, mesh, sizes):
    mesh = hj.data_mesh() if mesh else None
    stage, state, theirs = begun(everything(), accumulate=count, mesh=mesh)
    with pytest.raises(ValueError, match=sizes):
        stage.update(state, theirs, images())


COMPARING = {
    "relational": (hj.methods.relational([PAIR]), 3, 8),
    "similarity": (hj.methods.similarity_preserving([PAIR]), 2, 12),
    "correlation": (hj.methods.correlation_congruence([PAIR]), 2, 12),
    "crd": (hj.crd(PAIR, negatives=hj.BatchNegatives()), 2, 12),
}


@pytest.mark.quick
@pytest.mark.parametrize("mesh", [None, 2], ids=["alone", "mesh"])
@pytest.mark.parametrize("name", COMPARING)
def test_micro_batches_in_which_nothing_can_be_compared_are_refused(name, mesh):
    """The loss of one example is constant, so it would teach nothing."""
    method, least, most = COMPARING[name]
    network = hj.linen(Net())
    shapes = jax.eval_shape(network.init, KEY, images()["image"])
    data = hj.Data(np.arange(BATCH, dtype=np.int32) % CLASSES)
    mesh = mesh and hj.data_mesh(jax.devices()[:mesh])

    def begun(count):
        term = hj.objective(task=TASK, term=method)
        how = {"mesh": mesh, "accumulate": count}
        stage = hj.distillation_stage(network, network, term, optax.sgd(0.1), **how)
        jax.eval_shape(stage.init, KEY, shapes, shapes, images(), data)

    # Both devices of a mesh have a part of each micro-batch.
    begun(most)
    if mesh is None:
        wanted = (
            rf"accumulate: expected at most {most} micro-batches of a batch of 24 "
            rf"examples, got 24\. Each has 1 of them\. \w+: expected "
            rf"hidden .* to have {least} examples or more, got \(1, 5\) and \(1, 5\)\."
        )
        with pytest.raises(hj.Refusal, match=wanted):
            begun(BATCH)
    begun(5)  # the step refuses a batch that cannot be divided
