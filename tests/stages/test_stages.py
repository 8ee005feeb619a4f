"""The two stages: what they train, what they leave alone, what they compute."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.networks import linen
from hintjax.stages.report import not_finite

CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(0)
BATCH = 8
CLASSES = 3
PAIR = ("block2", "block2")
BELOW, ABOVE = ("block1", "block2"), ("block3", "block4", "head")


class Block(nn.Module):
    width: int
    norm: bool

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.relu(x)


class Net(nn.Module):
    """Four blocks and a head; or, really cut, the first blocks alone."""

    width: int
    norm: bool = True
    blocks: int = 4
    head: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i in range(self.blocks):
            x = Block(self.width, self.norm, name=f"block{i + 1}")(x, train)
        if self.head:
            x = nn.Dense(CLASSES, name="head")(x.mean((1, 2)))
        return x


class Stochastic(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6, name="hidden")(x[:, 0, 0])
        x = nn.Dropout(0.5, deterministic=not train, name="dropout")(x)
        return nn.Dense(CLASSES, name="head")(x)


def images(seed=0, count=BATCH):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(count, 8, 8, 1)).astype(np.float32),
        "label": generator.integers(0, CLASSES, count).astype(np.int32),
    }


def points(count=BATCH):
    """Images of one pixel, for networks of dense layers."""
    generator = np.random.default_rng(1)
    return {
        "image": generator.normal(size=(count, 1, 1, 4)).astype(np.float32),
        "label": generator.integers(0, CLASSES, count).astype(np.int32),
    }


@functools.cache
def made(module, seed=0, pixel=False):
    """A network and variables for it, as host arrays."""
    network = linen(module)
    image = (points() if pixel else images())["image"]
    return network, filled(jax.eval_shape(network.init, KEY, image), seed)


def filled(shapes, seed=0):
    """Drawn by numpy: to compile an initialization takes longer than most tests."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            x = generator.uniform(0.5, 2.0, leaf.shape)
        else:
            x = (
                generator.normal(size=leaf.shape)
                / max(1, np.prod(leaf.shape[:-1])) ** 0.5
            )
        return np.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def hints(*pairs, **kwargs):
    return hj.objective(hint=hj.fitnets(list(pairs or [PAIR]), **kwargs))


def task():
    return hj.task(CROSS_ENTROPY)


def copied(tree):
    """Bytes of now, whatever happens to the buffers."""
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), got, want
    )


def moved(before, after):
    """Whether each leaf has moved."""
    return [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    ]


def only(tree, names):
    return {name: tree[name] for name in names if name in tree}


class Traced:
    """The inputs of a network, counting how often they are traced."""

    count = 0

    def __call__(self, batch):
        self.count += 1
        return batch["image"]


def alive(tree):
    return not any(x.is_deleted() for x in jax.tree.leaves(tree))


def flops(stage, state, teacher, batch):
    lowered = stage.update.lower(state, teacher, batch)
    # As much work, compiled in less time: this program is never run.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    return compiled.cost_analysis()["flops"]


# The hint stage: what it computes


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_the_hint_stage_computes_what_networks_cut_at_the_hint_compute(norm):
    def cost(make, **cut):
        student, ours = made(Net(4, norm, **cut))
        teacher, theirs = made(Net(6, norm, **cut), seed=1)
        stage = make(student, teacher, hints(), optax.adam(1e-3))
        batch = images()
        return flops(stage, stage.init(KEY, ours, theirs, batch), theirs, batch)

    whole = cost(hj.hint_stage)
    really_cut = cost(hj.hint_stage, blocks=2, head=False)
    assert abs(whole / really_cut - 1) < 0.02
    # What is measured does see what stands above: twice the blocks, twice the work.
    output = hj.objective(hint=hints(), task=hj.weighted(task(), 0.1), kd=hj.kd())
    full = cost(lambda s, t, _, o: hj.distillation_stage(s, t, output, o))
    assert full > 1.6 * whole


def test_a_student_alone_is_cut_where_the_teacher_is_not():
    """The hint may be the teacher's last layer while the guided one is the first."""

    def cost(blocks):
        student, ours = made(Net(4, True, blocks=blocks, head=blocks == 4))
        teacher, theirs = made(Net(6, False, blocks=1, head=False), seed=1)
        method = hints(("block1", "block1"))
        stage = hj.hint_stage(student, teacher, method, optax.sgd(1e-3))
        batch = images()
        return flops(stage, stage.init(KEY, ours, theirs, batch), theirs, batch)

    assert abs(cost(4) / cost(1) - 1) < 0.02


# The hint stage: what it trains

SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "momentum": lambda: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(SCHEDULE, momentum=0.9)
    ),
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def hundred(request):
    """100 hint steps: what was there before, and what is after."""
    student, variables = made(Net(4))
    teacher, theirs = made(Net(6), seed=1)
    ours, theirs = jax.tree.map(jnp.array, (variables, theirs))
    schedule = optax.linear_schedule(100.0, 1.0, 50)
    method = hj.objective(
        hint=hj.weighted(hj.fitnets([PAIR], regressor=normed), schedule)
    )
    traced = Traced()
    stage = hj.hint_stage(
        student, teacher, method, OPTIMIZERS[request.param](), inputs=traced
    )
    before = copied((ours, theirs))
    batches = [jax.tree.map(jnp.array, images(seed)) for seed in range(4)]
    state = stage.init(KEY, ours, theirs, batches[0])
    first = copied(state._replace(key=None))
    losses, traces = [], set()
    for i in range(100):
        state, metrics = stage.update(state, theirs, batches[i % 4])
        losses.append(metrics["loss"])
        traces.add(traced.count)
    return {
        "traces": traces,
        "before": before,
        "ours": ours,
        "theirs": theirs,
        "batches": batches,
        "first": first,
        "state": state,
        "losses": np.array(losses),
    }


def normed(student, teacher):
    return hj.regressors.conv(student, teacher, batch_norm=True, activation=nn.relu)


def test_layers_above_the_hint_are_bit_identical_after_100_steps(hundred):
    (before, _), state = hundred["before"], hundred["state"]
    after = hj.student_variables(state)
    for name in ABOVE:
        equal(after.params[name], before.params[name])
    for name in ("block3", "block4"):
        equal(after.state["batch_stats"][name], before.state["batch_stats"][name])


def test_layers_below_the_hint_and_the_regressor_have_moved(hundred):
    (before, _), state = hundred["before"], hundred["state"]
    after = hj.student_variables(state)
    for name in BELOW:
        assert all(moved(before.params[name], after.params[name]))
        stats = before.state["batch_stats"][name], after.state["batch_stats"][name]
        assert all(moved(*stats))
    first = hundred["first"]
    assert all(moved(first.params["regressors"], state.params["regressors"]))
    assert all(moved(first.memory, state.memory))
    assert hundred["losses"][-4:].mean() < 0.1 * hundred["losses"][:4].mean()
    assert np.isfinite(hundred["losses"]).all()


def test_nothing_of_the_optimizer_is_kept_for_what_is_frozen(hundred):
    """No moments for layers above: neither memory nor drift."""
    shapes = [x.shape for x in jax.tree.leaves(hundred["state"].opt_state)]
    params = hundred["state"].params["student"]
    assert params["head"]["kernel"].shape not in shapes
    assert params["block2"]["norm"]["scale"].shape in shapes


def test_the_teacher_is_bit_identical_after_a_run(hundred):
    equal(hundred["theirs"], hundred["before"][1])


def test_100_steps_with_schedules_are_one_trace(hundred):
    assert len(hundred["traces"]) == 1


def test_the_arrays_of_the_caller_survive_donation(hundred):
    kept = [hundred[name] for name in ("ours", "theirs", "batches")]
    assert alive(kept)
    equal(hundred["ours"], hundred["before"][0])


def test_the_step_and_the_key_are_counted_and_kept(hundred):
    state = hundred["state"]
    assert state.step == 100
    assert state.step.dtype == jnp.int32
    assert hundred["losses"].dtype == np.float32


# The hint stage: what feeds the hint is a dependency, not a name


class Bare(nn.Module):
    """The guided layer is a BatchNorm without parameters."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("low", "high"):
            x = nn.Dense(5, name=name)(x)
            norm = nn.BatchNorm(
                use_running_average=not train,
                use_scale=False,
                use_bias=False,
                name=f"norm_{name}",
            )
            x = nn.relu(norm(x))
        return nn.Dense(CLASSES, name="head")(x)


class Reused(nn.Module):
    """One layer stands below the hint and above it."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        shared = nn.Dense(4, name="shared")
        x = nn.Dense(4, name="guided")(nn.relu(shared(x)))
        x = nn.Dense(4, name="above")(x)
        return nn.Dense(CLASSES, name="head")(shared(x))


class Parallel(nn.Module):
    """`aside` runs first, and sorts first, but feeds only the head."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        aside = nn.Dense(4, name="aside")(x)
        x = nn.Dense(4, name="guided")(x)
        return nn.Dense(CLASSES, name="head")(nn.relu(aside + x))


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(
            nn.Dense(4, name="second")(nn.relu(nn.Dense(4, name="first")(x)))
        )


class Rematerialized(nn.Module):
    """The hint lies inside a rematerialized block."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("low", "high"):
            x = nn.remat(Part)(name=name)(x)
        return nn.Dense(CLASSES, name="head")(x)


class Compiled(nn.Module):
    """The hint lies inside a jitted block."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("low", "high"):
            x = nn.jit(Part)(name=name)(x)
        return nn.Dense(CLASSES, name="head")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(4, name="dense")(x)), None


class Scanned(nn.Module):
    """The guided layers are stacked; one more scan stands above them."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        scan = nn.scan(
            Step,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        for name in ("low", "high"):
            x, _ = scan(name=name)(x, None)
        return nn.Dense(CLASSES, name="head")(x)


class Blocked(nn.Module):
    """`stopped` feeds the hint only through a gate that lets nothing back."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        gate = nn.sigmoid(nn.Dense(4, name="gate")(x))
        return nn.Dense(CLASSES, name="head")(nn.Dense(4, name="guided")(x * gate))


DEPENDENCIES = {
    "bare norm": (Bare(), "norm_low", {"low"}, {"norm_low"}),
    "before a norm": (Bare(), "high", {"low", "high"}, {"norm_low"}),
    "shared": (Reused(), "guided", {"shared", "guided"}, set()),
    "first call": (Reused(), "shared#0", {"shared"}, set()),
    "second call": (Reused(), "shared#1", {"shared", "guided", "above"}, set()),
    "parallel": (Parallel(), "guided", {"guided"}, set()),
    "its input": (Parallel(), "head:in", {"aside", "guided"}, set()),
    "remat": (Rematerialized(), "low", {"low"}, set()),
    "jit": (Compiled(), "low", {"low"}, set()),
    "scan": (Scanned(), "low/dense", {"low"}, set()),
    "gate": (Blocked(), "guided", {"gate", "guided"}, set()),
}


@pytest.mark.parametrize("case", DEPENDENCIES)
def test_exactly_what_feeds_the_guided_layer_is_trained(case):
    module, guided, trained, kept = DEPENDENCIES[case]
    student, ours = made(module, pixel=True)
    teacher, theirs = made(module, seed=1, pixel=True)
    sizing = hj.regressors.identity
    batch = points()
    examples = len(batch["image"])

    def loss(student, teacher):  # stacked layers come first, then the batch
        each = jnp.square(student - teacher).mean((-3, -2, -1))
        return each.reshape(-1, examples).mean(0)

    method = hints((guided, guided), regressor=sizing, loss=loss)
    optimizer = optax.adamw(1e-2, weight_decay=0.5)
    stage = hj.hint_stage(student, teacher, method, optimizer)
    state = stage.init(KEY, ours, theirs, batch)
    for _ in range(2):
        state, _ = stage.update(state, theirs, batch)
    params, model_state = hj.student_variables(state)
    changed = {n for n in params if any(moved(ours.params[n], params[n]))}
    assert changed == trained
    stats = model_state.get("batch_stats", {})
    before = ours.state.get("batch_stats", {})
    assert {n for n in stats if any(moved(before[n], stats[n]))} == kept


@pytest.mark.parametrize("module", [Rematerialized(), Compiled()], ids=["remat", "jit"])
def test_what_stands_above_the_hint_in_the_same_block_is_frozen(module):
    student, ours = made(module, pixel=True)
    teacher, theirs = made(module, seed=1, pixel=True)
    method = hints(("high/first", "high/first"))
    stage = hj.hint_stage(student, teacher, method, optax.adamw(1e-2, weight_decay=0.5))
    batch = points()
    state, _ = stage.update(stage.init(KEY, ours, theirs, batch), theirs, batch)
    params = state.params["student"]
    assert all(moved(ours.params["high"]["first"], params["high"]["first"]))
    equal(params["high"]["second"], ours.params["high"]["second"])


@pytest.mark.quick
def test_the_hint_stage_refuses_a_loss_of_the_output():
    student, _ = made(Net(4))
    teacher, _ = made(Net(6), seed=1)
    for method in (task(), hj.kd(), hj.objective(hint=hints(), task=task())):
        with pytest.raises(ValueError, match="hint_stage: .* distillation_stage"):
            hj.hint_stage(student, teacher, method, optax.sgd(0.1))


# The distillation stage

EVERYTHING = {
    "task": lambda: hj.weighted(task(), 0.1),
    "kd": lambda: hj.weighted(hj.kd(), 0.9),
    "hint": lambda: hj.fitnets([PAIR], regressor=normed),
    "at": lambda: hj.weighted(hj.attention_transfer([PAIR]), 1000.0),
}


@pytest.fixture(scope="module")
def distilled():
    """A compiled stage of all methods at once, with BatchNorm and a mask."""
    student, ours = made(Net(4))
    teacher, theirs = made(Net(6), seed=1)
    method = hj.objective(**{name: make() for name, make in EVERYTHING.items()})
    stage = hj.distillation_stage(student, teacher, method, optax.sgd(0.1))
    return stage, ours, theirs


@pytest.mark.quick
def test_one_update_reports_every_term_and_moves_the_whole_student(distilled):
    stage, ours, theirs = distilled
    batch = images()
    start = stage.init(KEY, ours, theirs, batch)
    state, metrics = stage.update(start, theirs, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(start.params))  # donated
    names = {"loss", "skipped", "task/accuracy", "hint/r2"}
    names |= {name + end for name in EVERYTHING for end in ("", "/weighted")}
    assert set(metrics) == names
    weighted = sum(metrics[f"{name}/weighted"] for name in EVERYTHING)
    np.testing.assert_allclose(metrics["loss"], weighted, rtol=1e-5)
    after = hj.student_variables(state)
    for name in (*BELOW, "block3", "block4", "head"):
        assert any(moved(ours.params[name], after.params[name]))
    assert all(moved(ours.state, after.state))


@pytest.mark.quick
def test_gradients_do_not_reach_the_teacher(distilled):
    stage, ours, theirs = distilled
    batch = jax.tree.map(jnp.array, images())
    state = stage.init(KEY, ours, theirs, batch)

    def through_the_stage(params):
        taught = stage.teach(state, theirs._replace(params=params), batch)
        return loss_of(taught)

    def loss_of(taught):
        return stage.step(state, taught, batch)[1]["loss"]

    @jax.jit
    def gradients(params):
        taught = stage.teach(state, theirs._replace(params=params), batch)
        return jax.grad(through_the_stage)(params), jax.grad(loss_of)(taught)

    by_params, by_features = gradients(theirs.params)
    assert not any(np.any(x) for x in jax.tree.leaves(by_params))
    # The loss does depend on what is taught: it is the stage that stops.
    assert all(np.any(x) for x in jax.tree.leaves(by_features))


@pytest.mark.quick
def test_evaluation_moves_nothing_and_runs_on_the_running_statistics(distilled):
    stage, ours, theirs = distilled
    batch = images()
    state = stage.init(KEY, ours, theirs, batch)
    before = copied(state._replace(key=None))
    metrics = stage.evaluate(state, theirs, batch)
    again = stage.evaluate(state, theirs, batch)
    assert alive(state)
    equal(state._replace(key=None), before)
    equal(metrics, again)
    apply = jax.jit(lambda v, x: Net(4).apply({"params": v.params, **v.state}, x))
    logits = np.float64(apply(ours, batch["image"]))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -log_p[np.arange(BATCH), batch["label"]].mean()
    np.testing.assert_allclose(metrics["task"], want, rtol=1e-4)
    right = (logits.argmax(-1) == batch["label"]).mean()
    np.testing.assert_allclose(metrics["task/accuracy"], right)


def test_dead_maps_and_an_empty_mask_leave_numbers(distilled):
    """Zeros everywhere, the worst input of norms and roots."""
    stage, ours, theirs = distilled
    zero = jax.tree.map(np.zeros_like, (ours, theirs))
    batch = {**images(), "where": np.ones(BATCH, bool)}
    batch["image"] = np.zeros_like(batch["image"])
    state, metrics = stage.update(stage.init(KEY, *zero, batch), zero[1], batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, metrics)))

    batch = {**images(), "where": np.zeros(BATCH, bool)}
    state = stage.init(KEY, ours, theirs, batch)
    params = copied(state.params)
    state, metrics = stage.update(state, theirs, batch)
    assert metrics["loss"] == metrics["task"] == 0
    equal(state.params, params)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    network, variables = made(Net(4, False))
    method = hj.objective(
        kd=hj.kd(),
        hint=hj.fitnets([PAIR], regressor=hj.regressors.identity),
        at=hj.attention_transfer([PAIR]),
    )
    stage = hj.distillation_stage(network, network, method, optax.sgd(1.0))
    state = stage.init(KEY, variables, variables, images())
    state, metrics = stage.update(state, variables, images())
    assert abs(metrics["loss"]) < 1e-6
    close(state.params["student"], variables.params, atol=1e-6)


@pytest.mark.quick
def test_examples_that_do_not_count_change_nothing():
    """A padded batch is the shorter batch, without BatchNorm."""
    student, ours = made(Net(4, False))
    teacher, theirs = made(Net(6, False), seed=1)
    method = hj.objective(
        task=task(),
        kd=hj.kd(),
        hint=hj.fitnets([PAIR]),
        at=hj.weighted(hj.attention_transfer([PAIR]), 1000.0),
    )
    stage = hj.distillation_stage(student, teacher, method, optax.sgd(0.1))
    short, padded = images(count=5), images(seed=9)
    where = np.array([False, True, True, True, False, True, True, False])
    padded["image"][~where] *= 1e3
    for name, value in short.items():
        padded[name][where] = value
    padded["where"] = where
    results = []
    for batch in (short, padded):
        state = stage.init(KEY, ours, theirs, batch)
        state, metrics = stage.update(state, theirs, batch)
        results.append((state.params, metrics))
    close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (BATCH, 1)])
def test_a_mask_of_another_shape_is_refused_with_a_sentence(distilled, shape):
    stage, ours, theirs = distilled
    batch = {**images(), "where": np.ones(shape, bool)}
    with pytest.raises(ValueError, match="where"):
        stage.update(stage.init(KEY, ours, theirs, batch), theirs, batch)


def test_a_teacher_is_trained_without_a_teacher():
    network, variables = made(Net(6), seed=1)
    method = hj.objective(task=task())
    stage = hj.distillation_stage(network, None, method, optax.adam(1e-2))
    batch = images()
    state = stage.init(KEY, variables, None, batch)
    losses = []
    for _ in range(20):
        state, metrics = stage.update(state, None, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


# Learning-rate multipliers


def by_hand(ours, batch):
    """The gradient of the task, without hintjax."""
    module = Net(4, False)

    def loss(params):
        logits = module.apply({"params": params}, batch["image"])
        return CROSS_ENTROPY(logits, batch["label"]).mean()

    return jax.jit(jax.grad(loss))(ours.params)


def test_a_rate_scales_the_update_of_all_that_feeds_the_layer():
    network, ours = made(Net(4, False))
    rates = {"block2": 0.25, "block1/conv": 0.5}
    method = hj.objective(task=task())
    stage = hj.distillation_stage(network, None, method, optax.sgd(0.5), rates=rates)
    batch = images()
    state, _ = stage.update(stage.init(KEY, ours, None, batch), None, batch)
    gradient = by_hand(ours, batch)
    factor = {"block1": 0.125, "block2": 0.25}  # overlapping factors multiply
    for name, before in ours.params.items():
        scale = -0.5 * factor.get(name, 1.0)
        want = jax.tree.map(lambda p, g, s=scale: p + s * g, before, gradient[name])
        close(state.params["student"][name], want, rtol=1e-5, atol=1e-7)


def test_a_rate_of_zero_freezes_under_weight_decay():
    network, ours = made(Net(4))
    stage = hj.distillation_stage(
        network,
        None,
        hj.objective(task=task()),
        optax.adamw(1e-2, weight_decay=0.5),
        rates={"block2": 0.0},
    )
    batch = images()
    state = stage.init(KEY, ours, None, batch)
    for _ in range(3):
        state, _ = stage.update(state, None, batch)
    params = state.params["student"]
    equal(only(params, BELOW), only(ours.params, BELOW))
    # Scale and bias of the norms and the kernels above have moved.
    assert all(moved(only(ours.params, ["head"]), only(params, ["head"])))


@pytest.mark.quick
def test_bad_rates_are_refused():
    network, ours = made(Net(4))
    make = functools.partial(
        hj.distillation_stage, network, None, hj.objective(task=task()), optax.sgd(0.1)
    )
    for rate in (-0.1, np.nan):
        with pytest.raises(ValueError, match="expected rates >= 0"):
            make(rates={"block2": rate})
    stage = make(rates={"blok2": 0.1})
    with pytest.raises(ValueError, match="got 'blok2'. Nearest: block2"):
        stage.init(KEY, ours, None, images())


# Starting one stage from another


@pytest.fixture(scope="module")
def relay():
    """A hint stage after one update, and the networks."""
    student, ours = made(Net(4))
    teacher, theirs = made(Net(6), seed=1)
    method = hints(regressor=normed)
    stage = hj.hint_stage(student, teacher, method, optax.adam(1e-2))
    batch = images()
    state, _ = stage.update(stage.init(KEY, ours, theirs, batch), theirs, batch)
    return student, teacher, theirs, state


def second(student, teacher, **terms):
    method = hj.objective(task=task(), **terms)
    return hj.distillation_stage(student, teacher, method, optax.sgd(0.1))


def test_carry_brings_regressors_and_memory_by_the_name_of_the_term(relay):
    student, teacher, theirs, earlier = relay
    terms = {"hint": hj.fitnets([PAIR], regressor=normed), "other": hj.fitnets([PAIR])}
    stage = second(student, teacher, **terms)
    start = hj.student_variables(earlier)
    batch, key = images(), jax.random.key(7)
    state = stage.init(key, start, theirs, batch, carry=earlier)
    fresh = stage.init(key, start, theirs, batch)
    equal(state.params["student"], start.params)
    equal(state.params["regressors"]["hint"], earlier.params["regressors"]["hint"])
    equal(state.memory["hint"], earlier.memory["hint"])
    equal(state.params["regressors"]["other"], fresh.params["regressors"]["other"])
    kernels = (s.params["regressors"]["hint"] for s in (fresh, earlier))
    assert any(moved(*kernels))
    assert state.step == 0

    before = copied(earlier._replace(key=None))
    stage.update(state, theirs, batch)
    assert alive(earlier)
    equal(earlier._replace(key=None), before)


@pytest.mark.quick
@pytest.mark.parametrize(
    "other",
    [
        lambda: hj.fitnets([PAIR]),
        lambda: hj.fitnets([("block2", "block3")], regressor=normed),
        lambda: hj.fitnets([PAIR], regressor=wide),
    ],
    ids=["memory", "pair", "shape"],
)
def test_carry_refuses_another_term_of_the_same_name(relay, other):
    student, teacher, theirs, earlier = relay
    stage = second(student, teacher, hint=other())
    start = hj.student_variables(earlier)
    with pytest.raises(ValueError, match="carry: expected the term 'hint'"):
        stage.init(KEY, start, theirs, images(), carry=earlier)


def wide(student, teacher):
    return hj.regressors.mlp(student, teacher, batch_norm=True)


def test_an_optimizer_begins_with_what_is_carried():
    """As optimizers that average or extrapolate parameters do: they keep a copy."""
    student, ours = made(Parallel(), pixel=True)
    teacher, theirs = made(Parallel(), seed=1, pixel=True)
    method, batch = hints(("guided", "guided")), points()
    first = hj.hint_stage(student, teacher, method, optax.sgd(0.1))
    earlier = first.init(KEY, ours, theirs, batch)
    second = hj.distillation_stage(student, teacher, method, keeping())
    key = jax.random.key(7)
    state = second.init(key, ours, theirs, batch, carry=earlier)
    equal(state.params["regressors"], earlier.params["regressors"])
    kept = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(kept) == len(jax.tree.leaves(state.params))
    equal(kept, jax.tree.leaves(state.params))


def keeping():
    """An optimizer whose state begins as the parameters."""
    return optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, state)
    )


def test_carry_without_a_common_term_is_refused(relay):
    """As from a stage of `fitnets(pairs)` alone to an objective with that term."""
    student, teacher, theirs, earlier = relay
    stage = second(student, teacher, hints=hj.fitnets([PAIR], regressor=normed))
    start = hj.student_variables(earlier)
    with pytest.raises(ValueError, match="carry"):
        stage.init(KEY, start, theirs, images(), carry=earlier)


def factors():
    """FT's objective of the network that `relay` uses."""
    return {"task": task(), "ft": hj.factor_transfer([PAIR])}


def test_what_a_stage_before_trained_is_remembered_and_never_decays(relay):
    student, teacher, theirs, _ = relay
    method, batch = hj.objective(**factors()), images()
    first = hj.hint_stage(student, teacher, method.prepare, optax.sgd(0.1))
    start = jax.jit(student.init)(KEY, batch["image"])
    earlier = first.init(KEY, start, theirs, batch)
    earlier, _ = first.update(earlier, theirs, batch)
    equal(earlier.params["student"], start.params)
    decaying = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    stage = hj.distillation_stage(student, teacher, method, decaying)
    state = stage.init(KEY, start, theirs, batch, carry=earlier)
    trained = earlier.params["regressors"]["ft"]
    equal(state.memory["ft"]["prepared"], trained)
    state, _ = stage.update(state, theirs, batch)
    equal(state.memory["ft"]["prepared"], trained)
    again = stage.init(KEY, start, theirs, batch, carry=state)  # and is carried on
    equal(again.memory["ft"]["prepared"], trained)


@pytest.mark.quick
def test_a_method_that_needs_a_stage_before_is_not_trained_without(relay):
    student, teacher, theirs, earlier = relay
    start, batch = hj.student_variables(earlier), images()
    alone = hj.distillation_stage(
        student, teacher, hj.factor_transfer([PAIR]), optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match="expected carry=, the state of the stage"):
        alone.init(KEY, start, theirs, batch)
    for stage in (
        alone,
        second(student, teacher, hint=hj.fitnets([PAIR]), ft=factors()["ft"]),
    ):
        with pytest.raises(ValueError, match="carry: expected"):
            stage.init(KEY, start, theirs, batch, carry=earlier)


# Randomness


def test_randomness_is_a_function_of_the_key_and_the_step():
    student, ours = made(Stochastic(), pixel=True)
    method = hj.objective(task=task())
    stage = hj.distillation_stage(student, None, method, optax.sgd(0.0))
    batch = points()

    def losses(key):
        state, seen = stage.init(key, ours, None, batch), []
        for _ in range(3):
            state, metrics = stage.update(state, None, batch)
            seen.append(float(metrics["loss"]))
        return seen

    one = losses(KEY)
    assert one == losses(KEY)
    assert len(set(one)) == 3  # the parameters stand still, the masks do not
    assert one != losses(jax.random.key(1))
    state = stage.init(KEY, ours, None, batch)
    evaluations = {
        float(stage.evaluate(state._replace(step=jnp.int32(i)), None, batch)["loss"])
        for i in range(2)
    }
    assert len(evaluations) == 1


def test_a_population_is_vmapped_over_the_step():
    student, ours = made(Stochastic(), pixel=True)
    stage = hj.distillation_stage(
        student, None, hj.objective(task=task()), optax.sgd(0.1, momentum=0.9)
    )
    batch = points()
    taught = stage.teach(None, None, batch)
    states = [stage.init(jax.random.key(i), ours, None, batch) for i in range(2)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)
    together, metrics = jax.jit(jax.vmap(stage.step, (0, None, None)))(
        together, taught, batch
    )
    for i, state in enumerate(states):
        alone, reported = jax.jit(stage.step)(state, taught, batch)
        close(jax.tree.map(lambda x, i=i: x[i], together.params), alone.params)
        np.testing.assert_allclose(metrics["loss"][i], reported["loss"], rtol=1e-5)


# Numbers going wrong


def told():
    """A loss whose value and slope the batch says."""

    def apply(params, memory, student, teacher, batch, context):
        x = 100 * student.output.sum(-1)
        flat = x - jax.lax.stop_gradient(x)
        return batch["value"] + batch["slope"] * flat, memory, {}

    def init(key, student, teacher, data):
        return {}, {}

    return hj.Method(hj.Wants(output=True), hj.Wants(), init, apply)


def batch_of(seed, **entries):
    """A batch with all that the terms of `guarded` want."""
    generator = np.random.default_rng(seed)
    return {
        "x": generator.normal(size=(BATCH, 4)).astype(np.float32),
        "label": generator.integers(0, CLASSES, BATCH).astype(np.int32),
        "index": generator.permutation(16)[:BATCH].astype(np.int32),
        "candidates": generator.integers(0, 16, (BATCH, 5)).astype(np.int32),
        "slope": np.zeros(BATCH, np.float32),
        "value": np.zeros(BATCH, np.float32),
        **entries,
    }


@pytest.fixture(scope="module", params=[None, 8], ids=["alone", "mesh"])
def guarded(request):
    """A stage with moments, statistics, a bank and nothing random; how to begin it."""
    mesh = request.param and hj.data_mesh()
    student, ours = made(Bare(), pixel=True)
    teacher, theirs = made(Bare(), seed=1, pixel=True)
    method = hj.objective(
        task=task(),
        hint=hj.fitnets([("high", "high")], regressor=wide),
        crd=hj.crd(
            ("high", "high"),
            negatives=hj.GivenNegatives(),
            feature_dim=4,
            mesh=mesh,
        ),
        told=told(),
    )
    stage = hj.distillation_stage(
        student, teacher, method, optax.adam(0.1), inputs=x, teacher_inputs=x, mesh=mesh
    )
    data = hj.Data(np.arange(16, dtype=np.int32) % CLASSES)
    begin = functools.partial(stage.init, KEY, ours, theirs, batch_of(0), data)
    return stage, begin, theirs


def x(batch):
    return batch["x"]


def one_nan(seed):
    batch = batch_of(seed)
    batch["x"][3] = np.nan
    return batch


def too_steep(seed):
    return batch_of(seed, slope=np.full(BATCH, 3e38, np.float32))


def endless(seed):
    return batch_of(seed, value=np.full(BATCH, np.inf, np.float32))


def values(state):
    """All that a skipped update must leave alone."""
    return copied(state._replace(step=None, key=None, skipped=None))


@pytest.mark.parametrize("bad", [one_nan, too_steep, endless])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(guarded, bad):
    stage, begin, theirs = guarded
    state, total = begin(), 0
    # First, when nothing is set yet, and later, twice in a row.
    for step, (make, in_a_row) in enumerate(
        [(bad, 1), (batch_of, 0), (bad, 1), (bad, 2), (batch_of, 0)]
    ):
        before = values(state)
        state, metrics = stage.update(state, theirs, make(step))
        total += make is bad
        after = values(state)
        if make is bad:
            equal(after, before)
        else:
            assert all(moved(before.params, after.params))
            assert all(moved(before.state, after.state))
            banks = (one.memory["crd"]["bank"][:2] for one in (before, after))
            assert all(moved(*banks))
        assert np.isfinite(metrics["loss"]) == (make is batch_of or bad is too_steep)
        assert metrics["skipped"] == state.skipped.total == total
        assert state.skipped.in_a_row == in_a_row
        assert state.step == step + 1
    never = begin()
    for step in (1, 4):
        never, _ = stage.update(never, theirs, batch_of(step))
    equal(values(state), values(never))


@pytest.mark.quick
def test_in_evaluation_nothing_is_skipped(guarded):
    stage, begin, theirs = guarded
    state = begin()
    before = copied(state._replace(key=None))
    metrics = stage.evaluate(state, theirs, one_nan(0))
    assert np.isnan(metrics["loss"])
    assert "skipped" not in metrics
    equal(state._replace(key=None), before)


# What an update is made of


class Line(nn.Module):
    """Two layers of one number each, without biases."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("first", "second"):
            x = nn.Dense(1, use_bias=False, name=name)(x)
        return x[:, 0]


def line(first, second):
    kernels = {"first": first, "second": second}
    return hj.Variables(
        {name: {"kernel": np.float32([[value]])} for name, value in kernels.items()},
        {},
    )


def squared(prediction, target):
    return jnp.square(prediction - target)


def reported(teacher, mesh=None, **weights):
    """The report of `task` 1/2 (b a x - y)^2 and a hint (r a x - t x)^2, at x = 1."""
    network = linen(Line())
    hint = hj.fitnets(
        [("first", "first")],
        regressor=functools.partial(hj.regressors.linear, bias=False),
        loss=lambda s, t: squared(s, t)[:, 0],
    )
    method = hj.objective(
        task=hj.weighted(hj.task(squared), weights.get("task", 0.5)),
        hint=hj.weighted(hint, weights.get("hint", 1.0)),
    )
    stage = hj.distillation_stage(
        network,
        network,
        method,
        optax.sgd(0.1),
        inputs=x,
        teacher_inputs=x,
        mesh=mesh,
    )
    batch = {"x": np.ones((8, 1), np.float32), "label": np.full(8, 5, np.float32)}
    state = stage.init(KEY, line(2, 3), teacher, batch)
    four = jax.tree.map(lambda leaf: jnp.full_like(leaf, 4), state.params["regressors"])
    state = state._replace(params={**state.params, "regressors": four})
    before = copied(state._replace(key=None))
    report = stage.report(state, teacher, batch)
    equal(state._replace(key=None), before)
    return report


@pytest.mark.quick
@pytest.mark.parametrize("devices", [1, 8])
def test_a_report_is_the_gradient_by_hand(devices):
    report = reported(line(7, 1), hj.data_mesh() if devices == 8 else None)
    # With a = 2, b = 3, r = 4, y = 5, t = 7: the task's slopes are (b a - y) (b, a),
    # the hint's 2 (r a - t) (r, a).
    task, hint = np.hypot(3, 2), np.hypot(8, 4)
    want = {
        "task": {"loss": 0.5, "norm": task, "share": task / (task + hint)},
        "hint": {"loss": 1.0, "norm": hint, "share": hint / (task + hint)},
    }
    want["task"]["shared"], want["hint"]["shared"] = 3, 8  # by a, not by b and r
    close(report["terms"], want)
    layers = {"student/first": 3 + 8, "student/second": 2}
    close(report["layers"], {**layers, "regressors/hint/first->first": 4})


@pytest.mark.quick
def test_a_term_of_weight_0_has_no_share():
    terms = reported(line(7, 1), hint=0.0)["terms"]
    assert terms["hint"] == {"loss": 0, "norm": 0, "share": 0, "shared": 0}
    np.testing.assert_allclose(terms["task"]["shared"], np.hypot(3, 2), rtol=1e-6)
    assert terms["task"]["share"] == 1


@pytest.mark.quick
def test_a_report_names_what_is_not_finite():
    report = reported(line(np.nan, 1))
    assert not_finite(report) == (
        ["hint"],
        ["regressors/hint/first->first", "student/first"],
    )
    assert report["terms"]["task"]["norm"] > 0


@pytest.mark.quick
def test_metrics_tell_which_terms_teach_nothing():
    good = {"loss": 1.0, "kd": 0.5, "kd/weighted": 0.0, "task": 1.0}
    good |= {"task/weighted": 1.0, "crd/outside": 0.0, "task/accuracy": 0.0}
    assert hj.silent_terms(good) == []
    assert hj.silent_terms(jax.tree.map(jnp.float32, good)) == []
    (said,) = hj.silent_terms({**good, "kd": jnp.float32(0)})
    assert said.startswith(
        "The loss of the term 'kd' is exactly 0: it teaches nothing."
    )
    (said,) = hj.silent_terms({**good, "task": jnp.nan, "norm": 1.0})
    assert said.startswith("The loss of the term 'task' is not finite: the step is sk")
    (said,) = hj.silent_terms({**good, "norm": 0.0})
    assert said.startswith("The gradient is exactly 0: the student does not move.")
    outside, wrong = hj.silent_terms(
        {**good, "crd/outside": 0.25, "crd/mislabeled": 0.5}
    )
    assert outside.startswith('25% of the examples have an "index" outside of the tr')
    assert wrong.startswith('50% of the examples have another "label" than Data(labels')
    (said,) = hj.silent_terms({"loss": 0.0, "r2": 1.0, "skipped": 0.0})
    assert said.startswith("The loss of the method is exactly 0")


@pytest.mark.quick
def test_norms_of_a_report_do_not_overflow():
    """Gradients of 8e37, whose square is no float32, are finite."""
    report = reported(line(-1e37, 1))
    assert not_finite(report) == (["hint"], [])  # only its loss overflows
    norm = report["terms"]["hint"]["norm"]
    np.testing.assert_allclose(norm, np.hypot(8e37, 4e37), rtol=1e-5)


@pytest.mark.quick
def test_a_method_alone_is_reported_as_the_loss():
    network, ours = made(Parallel(), pixel=True)
    stage = hj.hint_stage(
        network, network, hj.fitnets([("guided", "guided")]), optax.sgd(0.1)
    )
    other = made(Parallel(), seed=1, pixel=True)[1]
    state = stage.init(KEY, ours, other, points())
    report = stage.report(state, other, points())
    assert report["terms"]["loss"]["share"] == 1
    assert report["layers"]["student/aside"] == report["layers"]["student/head"] == 0
    assert report["layers"]["student/guided"] > 0
    assert report["layers"]["regressors/guided->guided"] > 0


# Optimizers of the user


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
def test_masks_and_labels_over_the_whole_tree_work_in_both_stages(make):
    """Decay on kernels alone, and an optimizer of its own for the regressors."""
    student, ours = made(Parallel(), pixel=True)
    teacher, theirs = made(Parallel(), seed=1, pixel=True)
    optimizer = optax.partition(
        {
            "student": optax.chain(
                optax.set_to_zero(),
                optax.add_decayed_weights(0.5, mask=kernels),
                optax.scale(-1.0),
            ),
            "regressors": optax.sgd(0.0),
        },
        {"student": "student", "regressors": "regressors"},
    )
    method = hints(("guided", "guided"))
    stage = make(student, teacher, method, optimizer)
    batch = points()
    state = stage.init(KEY, ours, theirs, batch)
    regressors = copied(state.params["regressors"])
    state, _ = stage.update(state, theirs, batch)
    equal(state.params["regressors"], regressors)
    trained = {"guided"} if make is hj.hint_stage else {"guided", "aside", "head"}
    for name, before in ours.params.items():
        after = state.params["student"][name]
        scale = 0.5 if name in trained else 1.0
        np.testing.assert_allclose(after["kernel"], scale * before["kernel"], rtol=1e-6)
        equal(after["bias"], before["bias"])


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize("keep", [False, True], ids=["schedule-free", "copy"])
def test_an_optimizer_that_keeps_the_parameters_can_be_donated(keep):
    """One buffer must neither be given away twice nor be the caller's."""
    student, ours = made(Stochastic(), pixel=True)
    ours = jax.tree.map(jnp.array, ours)
    before = copied(ours)
    optimizer = optax.contrib.schedule_free_sgd(0.1)
    if keep:
        optimizer = optax.chain(optax.sgd(0.1), keeping())
    stage = hj.distillation_stage(student, None, hj.objective(task=task()), optimizer)
    batch = points()
    state = stage.init(KEY, ours, None, batch)
    for _ in range(2):
        state, metrics = stage.update(state, None, batch)
    assert np.isfinite(metrics["loss"])
    assert alive(ours)
    equal(ours, before)


def test_what_a_method_remembers_of_the_data_is_a_copy():
    def init(key, student, teacher, data):
        return {}, {"labels": data.labels}

    def apply(params, memory, student, teacher, batch, context):
        return student.output.mean(-1), memory, {}

    wants = hj.Wants(output=True)
    method = hj.Method(wants, hj.Wants(), init, apply)
    student, ours = made(Stochastic(), pixel=True)
    stage = hj.distillation_stage(student, None, method, optax.sgd(0.1))
    data = hj.Data(jnp.arange(20))
    state = stage.init(KEY, ours, None, points(), data)
    state, _ = stage.update(state, None, points())
    equal(state.memory["labels"], np.arange(20))
    assert alive(data)


def test_a_parameter_of_weak_type_is_still_one_trace():
    class Gain(nn.Module):
        @nn.compact
        def __call__(self, x):
            gain = self.param("gain", lambda key: jnp.asarray(1.0))
            return nn.Dense(CLASSES)(gain * x[:, 0, 0])

    network = linen(Gain())
    batch = points()
    variables = jax.jit(network.init)(KEY, batch["image"])
    method = hj.objective(task=task())
    traced = Traced()
    stage = hj.distillation_stage(network, None, method, optax.sgd(0.1), inputs=traced)
    state = stage.init(KEY, variables, None, batch)
    state, _ = stage.update(state, None, batch)
    once = traced.count
    state, _ = stage.update(state, None, batch)
    assert traced.count == once


@pytest.mark.quick
def test_what_a_method_trains_is_never_of_weak_type():
    """What comes out of an update is not, and would be compiled for once more."""
    network, variables = made(Net(4))
    weak = hj.Method(
        hj.Wants(output=True),
        hj.Wants(),
        lambda key, student, teacher, data: ({"scale": jnp.asarray(1.0)}, {}),
        lambda params, memory, student, *rest: (
            params["scale"] * student.output.sum(-1),
            memory,
            {},
        ),
    )
    stage = hj.distillation_stage(network, None, weak, optax.sgd(0.1))
    state = stage.init(KEY, variables, None, images())
    assert not state.params["regressors"]["scale"].weak_type


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
def test_a_model_that_sows_a_loss_can_be_trained(make):
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="guided")(x)
            self.sow("losses", "balance", x.mean())
            return nn.Dense(CLASSES, name="head")(x)

    network = linen(Sowing())
    batch = points()
    variables = jax.jit(network.init)(KEY, batch["image"])
    stage = make(network, network, hints(("guided", "guided")), optax.sgd(0.1))
    state = stage.init(KEY, variables, variables, batch)
    for _ in range(2):
        state, _ = stage.update(state, variables, batch)


# Errors


def stages() -> dict[str, Callable]:
    student, _ = made(Net(4))
    teacher, _ = made(Net(6), seed=1)
    return {
        "hint": lambda **k: hj.hint_stage(
            student, teacher, hints(k.pop("pair", PAIR)), optax.sgd(0.1), **k
        ),
        "distillation": lambda **k: hj.distillation_stage(
            student,
            teacher,
            hj.objective(task=task(), hint=hints(k.pop("pair", PAIR))),
            optax.sgd(0.1),
            **k,
        ),
    }


def started(stage, teacher=True, **batch):
    _, ours = made(Net(4))
    _, theirs = made(Net(6), seed=1)
    batch = {name: x for name, x in {**images(), **batch}.items() if x is not None}
    return stage.init(KEY, ours, theirs if teacher else None, batch)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["hint", "distillation"])
class TestErrorsBeforeAnyCompilation:
    def test_integer_images(self, name):
        with pytest.raises(TypeError, match='"image" to be floating point, got uint8'):
            started(stages()[name](), image=np.zeros((BATCH, 8, 8, 1), np.uint8))

    def test_no_images(self, name):
        with pytest.raises(ValueError, match=r"'image' in the batch, got \['label'\]"):
            started(stages()[name](), image=None)

    def test_unknown_layer_of_the_student(self, name):
        with pytest.raises(ValueError, match="got 'block9'. Nearest: block"):
            started(stages()[name](pair=("block9", "block2")))

    def test_unknown_layer_of_the_teacher(self, name):
        with pytest.raises(ValueError, match="got 'group2'. Nearest: "):
            started(stages()[name](pair=("block2", "group2")))

    def test_a_pair_that_no_regressor_fits(self, name):
        with pytest.raises(ValueError, match=r"student \(8, 8, 4\) and teacher \(3,\)"):
            started(stages()[name](pair=("block2", "head")))

    def test_no_variables_of_the_teacher(self, name):
        with pytest.raises(ValueError, match="teacher"):
            started(stages()[name](), teacher=False)


@pytest.mark.usefixtures("unchecked")
def test_images_without_channels_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"image.*\(8, 8, 8\)"):
        started(stages()["hint"](), image=np.zeros((BATCH, 8, 8), np.float32))


@pytest.mark.quick
def test_a_method_of_the_teacher_needs_a_teacher():
    student, _ = made(Net(4))
    for method in (hj.kd(), hints()):
        with pytest.raises(ValueError, match="stage: expected a teacher"):
            hj.distillation_stage(student, None, method, optax.sgd(0.1))


@pytest.mark.quick
def test_kd_between_unlike_classes_is_refused():
    student, ours = made(Net(4))
    teacher, theirs = made(Net(6, True, 2, False), seed=1)
    stage = hj.distillation_stage(student, teacher, hj.kd(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="kd: expected student and teacher to have"):
        stage.init(KEY, ours, theirs, images())


def test_images_that_turn_integer_later_are_refused_too(distilled):
    stage, ours, theirs = distilled
    state = stage.init(KEY, ours, theirs, images())
    batch = {**images(), "image": np.zeros((BATCH, 8, 8, 1), np.int32)}
    with pytest.raises(TypeError, match="floating point, got int32"):
        stage.update(state, theirs, batch)
    assert alive(state)


# Inputs


def test_each_network_sees_its_own_inputs():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="guided")(x["a"] + x["b"])

    one, two = linen(nn.Dense(4)), linen(Two())
    generator = np.random.default_rng(0)
    batch = {n: generator.normal(size=(4, 5)).astype(np.float32) for n in "ab"}
    batch["ids"] = np.arange(4)
    theirs = one.init(KEY, batch["a"])
    ours = two.init(KEY, batch)
    ours.params["guided"] = theirs.params
    stage = hj.distillation_stage(
        two,
        one,
        hj.kd(),
        optax.sgd(0.1),
        inputs=lambda batch: {name: batch[name] for name in "ab"},
        teacher_inputs=lambda batch: batch["a"] + batch["b"],
    )
    metrics = stage.evaluate(stage.init(KEY, ours, theirs, batch), theirs, batch)
    assert abs(metrics["loss"]) < 1e-6


def test_shapes_are_enough_to_begin():
    """A stage is initialized from the shapes of a batch."""
    student, ours = made(Net(4))
    teacher, theirs = made(Net(6), seed=1)
    stage = hj.hint_stage(student, teacher, hints(), optax.adam(1e-2))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), images())
    equal(
        stage.init(KEY, ours, theirs, shapes)._replace(key=None),
        stage.init(KEY, ours, theirs, images())._replace(key=None),
    )


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
def test_arguments_out_of_order_are_named(make, unchecked):
    network = linen(Net(4))
    method, optimizer = hints(), optax.sgd(0.1)
    with pytest.raises(TypeError, match=r"method to be Method, got .*Gradient"):
        make(network, network, optimizer, method)
    with pytest.raises(TypeError, match=r"method to be Method, got Weighted"):
        make(network, network, hj.weighted(method, 2.0), optimizer)
    with pytest.raises(TypeError, match=r"optimizer to be Grad.*, got"):
        make(network, network, method, 0.1)
