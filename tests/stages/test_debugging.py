"""A checked stage names what is wrong, and else does what the stage does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.stages import accumulation, debugging

KEY = jax.random.key(0)
BATCH, CLASSES = 16, 3
PAIR = ("guided", "guided")
TASK = hj.task(optax.softmax_cross_entropy_with_integer_labels)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4, name="guided")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(CLASSES, name="head")(nn.relu(x))


def batch(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "x": generator.normal(size=(BATCH, 3)).astype(np.float32),
        "label": np.arange(BATCH, dtype=np.int32) % CLASSES,
        "index": np.arange(BATCH, dtype=np.int32),
        "value": np.zeros(BATCH, np.float32),
        "slope": np.zeros(BATCH, np.float32),
        "where": np.arange(BATCH) != 15,
    }


def told():
    """A loss whose value and slope the batch says, squared: finite may be too much."""

    def apply(params, memory, student, teacher, batch, context):
        x = 1e30 * student.output.sum(-1)
        flat = x - jax.lax.stop_gradient(x)
        return batch["value"] ** 2 + batch["slope"] * flat, memory, {}

    return hj.Method(hj.Wants(output=True), hj.Wants(), lambda *_: ({}, {}), apply)


def begun(split=None, **how):
    network = hj.linen(Net())
    shapes = jax.eval_shape(network.init, KEY, batch()["x"])

    def drawn(seed):
        generator = np.random.default_rng(seed)

        def draw(path, leaf):
            positive = path[-1].key in ("scale", "var")
            x = generator.uniform(0.5, 2, leaf.shape) if positive else 0
            return np.float32(x if positive else generator.normal(size=leaf.shape))

        return jax.tree_util.tree_map_with_path(draw, shapes)

    method = hj.objective(
        task=TASK,
        hint=hj.fitnets([PAIR], regressor=hj.regressors.linear),
        crd=hj.crd(
            PAIR,
            negatives=hj.SharedNegatives(8),
            feature_dim=4,
            mesh=split,
        ),
        told=told(),
    )
    stage = hj.distillation_stage(
        network,
        network,
        method,
        optax.adam(0.01),
        inputs=lambda batch: batch["x"],
        teacher_inputs=lambda batch: batch["x"],
        **how,
    )
    ours, theirs = drawn(0), drawn(1)
    data = hj.Data(np.arange(BATCH, dtype=np.int32) % CLASSES)
    return stage, stage.init(KEY, ours, theirs, batch(), data), theirs


@pytest.fixture(
    scope="module",
    params=[{}, {"mesh": True}, {"accumulate": 2}, {"accumulate": 2, "scan": True}],
    ids=["alone", "mesh", "accumulated", "scan"],
)
def stages(request):
    """The stage, the same one checked, and where they begin."""
    how = dict(request.param)
    if how.pop("mesh", False):
        how["mesh"] = hj.data_mesh()
    with pytest.MonkeyPatch.context() as patch:
        if how.pop("scan", False):
            patch.setattr(accumulation, "unrolled", lambda layout: False)
        stage, state, theirs = begun(**how)
        yield stage, hj.checked(stage), state, theirs


def entry(name, number, value):
    def wrong(state, theirs, batch):
        batch[name][number] = value
        return state, theirs, batch

    return wrong


def student(layer, name, value):
    def wrong(state, theirs, batch):
        params = jax.tree.map(jnp.array, state.params)
        params["student"][layer][name] = params["student"][layer][name].at[0].set(value)
        return state._replace(params=params), theirs, batch

    return wrong


def regressor(value):
    def wrong(state, theirs, batch):
        regressors = {**state.params["regressors"]}
        regressors["hint"] = jax.tree.map(
            lambda leaf: jnp.full_like(leaf, value), regressors["hint"]
        )
        params = {**state.params, "regressors": regressors}
        return state._replace(params=params), theirs, batch

    return wrong


def teacher(layer, value):
    def wrong(state, theirs, batch):
        params = {**theirs.params}
        params[layer] = jax.tree.map(lambda x: np.full_like(x, value), params[layer])
        return state, theirs._replace(params=params), batch

    return wrong


WRONG = {
    "label": (entry("label", 5, CLASSES), "labels in 0..2, got 3 at example 5."),
    "negative label": (entry("label", 6, -1), "labels in 0..2, got -1 at example 6."),
    "index": (entry("index", 5, BATCH), "'index' in 0..15, got 16 at example 5."),
    "negative index": (entry("index", 2, -1), "'index' in 0..15, got -1 at example 2."),
    "other label": (
        entry("label", 4, 0),
        "'label' to be the label of Data(labels) at 'index', got 0 at example 4.",
    ),
    "index left out": (entry("index", 15, 99), None),
    "input": (entry("x", 7, np.nan), "finite 'x' in the batch, got nan at example 7."),
    "parameter": (
        student("guided", "bias", -np.inf),
        "finite parameters in student/guided, got -inf.",
    ),
    "teacher": (
        teacher("guided", np.inf),
        "finite features of the teacher at 'guided', got",
    ),
    "output": (teacher("head", np.inf), None),  # of which no method reads anything
    "dead": (
        teacher("guided", 0),
        "features of the teacher at 'guided' to have a norm > 0, got 0.0 at example 0.",
    ),
    "student": (
        student("guided", "kernel", 3e38),
        "finite features of the student at 'guided', got",
    ),
    "regressor": (regressor(3e38), "finite outputs of the regressor "),
    "loss": (entry("value", 9, 1e30), "finite losses of the term 'told', got inf."),
    "gradient": (entry("slope", 9, 1e30), "finite gradients in student/"),
    "left out": (entry("label", 15, 99), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(stages, case):
    _, checked, state, theirs = stages
    wrong, sentence = WRONG[case]
    state = state._replace(step=jnp.int32(12))
    arguments = wrong(state, theirs, batch())
    if sentence is None:
        checked.update(*arguments)
        return
    with pytest.raises(ValueError) as error:
        checked.update(*arguments)
    assert str(error.value).startswith(f"step 12: expected {sentence}")
    assert "\n" not in str(error.value)
    # The state is not donated: what led to the error can be looked at.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0]))
    # In evaluation an index is a position in another split.
    untold = ("gradient", "parameter", "other label", "index", "negative index")
    if case not in untold:
        with pytest.raises(ValueError, match="step 12: expected"):
            checked.evaluate(*arguments)


@pytest.mark.bits
def test_what_is_right_comes_to_the_same_bits(stages):
    stage, checked, state, theirs = stages
    ours, reported = [], []
    for one in (stage, checked):
        now, metrics = jax.tree.map(jnp.array, state), []
        for seed in range(3):
            now, found = one.update(now, theirs, batch(seed))
            metrics.append(found)
        metrics.append(one.evaluate(now, theirs, batch(7)))
        ours.append(jax.device_get(now._replace(key=None)))
        reported.append(jax.device_get(metrics))
    jax.tree.map(np.testing.assert_array_equal, *ours)
    jax.tree.map(np.testing.assert_array_equal, *reported)
    assert ours[0].step == 3


def test_a_memory_that_is_split_is_refused_with_a_sentence():
    mesh = hj.data_mesh()
    stage, state, theirs = begun(split=mesh, mesh=mesh)
    with pytest.raises(ValueError, match="checked: expected a method whose memory"):
        hj.checked(stage).update(state, theirs, batch())
    assert not debugging.watching()
    stage.update(state, theirs, batch())


def test_an_index_of_another_split_may_be_evaluated(stages):
    _, checked, state, theirs = stages
    checked.evaluate(*entry("index", 5, 1000)(state, theirs, batch()))


def test_what_is_checked_twice_has_the_checks_once():
    stage, _, _ = begun()
    twice = hj.checked(hj.checked(stage))
    assert twice.update.__wrapped__ is stage.update.__wrapped__
    assert twice.evaluate.__wrapped__ is stage.evaluate.__wrapped__


def test_labels_that_the_task_leaves_out_pass():
    check = debugging.raising(
        lambda label, output: debugging._Check(
            jnp.int32(3),
            debugging._Examples(jnp.ones(2, bool), lambda place: place),
        ).labels(label, output, ignored=(255, -1))
    )
    check(jnp.asarray([[1, 255], [-1, 0]]), jnp.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="labels in 0..2, got 254 at example 1."):
        check(jnp.asarray([[1, 255], [-1, 254]]), jnp.zeros((2, 2, 3)))


def test_one_output_is_of_two_classes():
    check = debugging.raising(
        lambda label, output: debugging._Check(
            jnp.int32(3),
            debugging._Examples(jnp.ones(2, bool), lambda place: place),
        ).labels(label, output)
    )
    check(jnp.asarray([0, 1]), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"step 3: expected labels in 0..1, got 2 at"):
        check(jnp.asarray([0, 2]), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"expected labels >= 0, got -1 at example 0."):
        check(jnp.asarray([-1, 2]), jnp.zeros(2))
