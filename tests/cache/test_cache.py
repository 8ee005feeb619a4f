"""The cache of a teacher: equal to the live teacher, never wrong, resumable."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import Refusal, cache
from hintjax.cache import shards
from hintjax.data import Augment, Split, Standardize, fixed_views, place, take, view_of
from hintjax.training import DamageError

pytestmark = pytest.mark.quick

N, BATCH, VIEWS = 24, 8, 2
AUGMENT = Augment(pad=1, flip=True)
STANDARD = Standardize(np.zeros(1, np.float32), np.ones(1, np.float32))


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3), name="first")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(nn.Conv(self.width, (3, 3), name="second")(x))
        return nn.Dense(4, name="classifier")(x.mean((1, 2)))


STUDENT, TEACHER = hj.linen(Net(4)), hj.linen(Net(12))
METHOD = hj.objective(
    task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
    kd=hj.weighted(hj.kd(4.0), 0.5),
    at=hj.weighted(hj.attention_transfer([("first", "first")]), 10.0),
    hint=hj.fitnets([("second", "second")]),
)


@functools.cache
def parts():
    random = np.random.default_rng(0)
    split = Split(
        random.integers(0, 255, (N, 6, 6, 1), np.uint8),
        random.integers(0, 4, N).astype(np.int32),
    )
    crops = fixed_views(N, VIEWS, AUGMENT)
    placed = place(split)

    def batch(index, view):
        view = view_of(crops, view)
        return take(placed, index, STANDARD, augment=AUGMENT, view=view)

    inputs = jnp.zeros((1, 6, 6, 1))
    student = STUDENT.init(jax.random.key(0), inputs)
    teacher = TEACHER.init(jax.random.key(1), inputs)
    return batch, student, teacher


def planned(coding="float32", method=METHOD):
    batch, student, teacher = parts()
    return cache.contents(
        STUDENT,
        TEACHER,
        method,
        student,
        teacher,
        batch(np.arange(BATCH), 0),
        coding=coding,
        examples=N,
        views=VIEWS,
    )


def computed(plan):
    batch, _, teacher = parts()
    encode = jax.jit(
        lambda variables, batch: plan.encode(plan.features(variables, batch))
    )
    return cache.by_batches(functools.partial(encode, teacher), batch, BATCH, N)


IDENTITY = {"teacher": "t", "total": N * VIEWS, "examples": N}


def cached_stage(plan):
    return hj.distillation_stage(
        STUDENT,
        plan.network,
        plan.reading(METHOD),
        optax.sgd(0.1),
        teacher_inputs=plan.inputs,
    )


def trained(stage, teacher, batches, student):
    state = stage.init(jax.random.key(2), student, teacher, batches[0])
    for batch in batches:
        state, metrics = stage.update(state, teacher, batch)
    return state.params, metrics


def test_a_step_from_the_cache_equals_the_step_of_the_live_teacher():
    batch, student, teacher = parts()
    plan = planned()
    rows = cache.in_memory(plan.rows, N * VIEWS, N, computed(plan))
    batches = [batch(np.arange(8) + 8 * v, v) for v in range(VIEWS)]
    optimizer = optax.sgd(0.1)
    live = hj.distillation_stage(STUDENT, TEACHER, METHOD, optimizer)
    params, metrics = trained(live, teacher, batches, student)
    stage = cached_stage(plan)
    everything = cache.variables_of(teacher, cache.flat(rows.everything()))
    with_rows = [
        {**b, cache.ROWS: rows.read(np.asarray(b["index"]), np.asarray(b["view"]))}
        for b in batches
    ]
    for variables, given in (
        (everything, batches),
        (cache.variables_of(teacher, None), with_rows),
    ):
        found, shown = trained(stage, variables, given, student)
        assert shown.pop("cache/outside") == 0
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            (found, shown),
            (params, metrics),
        )
    # A batch of evaluation has no view, and so runs the live teacher.
    plain = {name: x for name, x in batches[0].items() if name != "view"}
    state = stage.init(jax.random.key(2), student, everything, batches[0])
    other = live.init(jax.random.key(2), student, teacher, batches[0])
    ours = stage.evaluate(state, everything, plain)
    theirs = live.evaluate(other, teacher, plain)
    assert {k: float(v) for k, v in ours.items()} == pytest.approx(
        {k: float(v) for k, v in theirs.items()}, rel=1e-5
    )


@pytest.mark.parametrize("together", [True, False])
def test_a_population_reads_one_cache(together):
    """Students with a cached teacher come to the numbers of a live teacher."""
    batch, student, teacher = parts()
    plan = planned()
    rows = cache.in_memory(plan.rows, N * VIEWS, N, computed(plan))
    live = hj.distillation_stage(STUDENT, TEACHER, METHOD, optax.sgd(0.1))
    everything = cache.variables_of(teacher, cache.flat(rows.everything()))
    found = []
    for stage, variables in ((live, teacher), (cached_stage(plan), everything)):
        crowd = hj.population(stage, 2, together=together)
        keys = jax.random.split(jax.random.key(3), 2)
        members = crowd.init(keys, student, variables, batch(np.arange(BATCH), 0))
        for view in range(VIEWS):
            given = batch(np.arange(BATCH) + BATCH * view, view)
            members, metrics = crowd.update(members, variables, given)
        params = [state.params for state in crowd.states(members)]
        found.append((params, metrics))
    np.testing.assert_array_equal(found[1][1].pop("cache/outside"), [0, 0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *found)


@pytest.mark.parametrize("coding", list(cache.CODINGS))
def test_stored_features_are_close_to_the_features(coding):
    batch, _, teacher = parts()
    plan = planned(coding, hj.fitnets([("second", "second")]))
    given = batch(np.arange(BATCH), 1)
    rows = plan.encode(plan.features(teacher, given))
    wants = hj.networks.Wants(hints=("second",))
    read, _ = plan.network.apply(
        *cache.variables_of(teacher, None),
        plan.inputs({**given, cache.ROWS: rows}),
        wants=wants,
        train=False,
    )
    live, _ = TEACHER.apply(*teacher, given["image"], wants=wants, train=False)
    got, expected = (np.asarray(f.hints["second"]) for f in (read, live))
    bound = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 254}[coding]
    largest = np.abs(expected).max((1, 2), keepdims=True)
    assert got.dtype == expected.dtype
    assert (np.abs(got - expected) <= bound * largest * 1.01 + 1e-7).all()


def test_a_reduction_stores_one_channel_of_an_attention_map():
    plan = planned(method=hj.attention_transfer([("first", "first")]))
    assert plan.nbytes == 6 * 6 * 1 * 4


def test_a_cache_is_written_once_and_completed_after_a_kill(tmp_path, monkeypatch):
    plan = planned("bfloat16")
    compute, calls = computed(plan), []
    monkeypatch.setattr(shards, "_SHARD", plan.nbytes * 10)
    monkeypatch.setattr(shards, "_PARTS", 1)

    def killed(numbers):
        calls.append(len(numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(numbers)

    with pytest.raises(KeyboardInterrupt):
        cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, killed)
    with pytest.raises(Refusal, match="48 rows"):
        cache.read(tmp_path, IDENTITY)
    assert shards.missing(tmp_path, plan.rows, N * VIEWS) == 28
    finished = []
    cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, killed, show=finished.append)
    assert calls == [10, 10, 10, 10, 10, 8]  # two shards were kept
    assert finished == [30, 40, 48]
    assert shards.missing(tmp_path, plan.rows, N * VIEWS) == 0
    cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, dict)  # computes nothing
    whole = cache.in_memory(plan.rows, N * VIEWS, N, compute)
    for mapped in (False, True):
        found = cache.read(tmp_path, IDENTITY, mapped=mapped)
        index, view = np.array([3, 23, 0]), np.array([1, 0, 1])
        for name, array in found.read(index, view).items():
            np.testing.assert_array_equal(array, whole.read(index, view)[name])
    assert found.nbytes == plan.nbytes * N * VIEWS


def test_a_cache_names_what_differs(tmp_path):
    plan = planned("int8")
    cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, computed(plan))
    with pytest.raises(Refusal, match="teacher"):
        cache.read(tmp_path, {**IDENTITY, "teacher": "another"})
    with pytest.raises(Refusal, match="teacher"):
        cache.write(tmp_path, {**IDENTITY, "teacher": "u"}, plan.rows, 1, dict)


def test_a_flipped_bit_is_found(tmp_path):
    plan = planned("int8")
    cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, computed(plan))
    file = min(tmp_path.glob("rows-*.npy"))
    damaged = bytearray(file.read_bytes())
    damaged[-7] ^= 4
    file.write_bytes(damaged)
    with pytest.raises(DamageError, match="rows-00000"):
        cache.read(tmp_path, IDENTITY)


def test_a_cache_has_shards_for_several_processes(tmp_path):
    plan = planned("int8")
    cache.write(tmp_path, IDENTITY, plan.rows, N * VIEWS, computed(plan))
    assert len(list(tmp_path.glob("rows-*.npy"))) == shards._PARTS == N * VIEWS / 3
    half = (tmp_path / "shards.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shards.jsonl").write_text("".join(half[::2]))
    (tmp_path / "shards-1.jsonl").write_text("".join(half[1::2]))
    assert shards.missing(tmp_path, plan.rows, N * VIEWS) == 0
    assert len(cache.read(tmp_path, IDENTITY).shards) == shards._PARTS
    with pytest.raises(Refusal, match=r"that all processes share, got no .*/elsewhere"):
        shards.check_shared(tmp_path / "elsewhere")


@pytest.mark.parametrize(("index", "view"), [(N, 0), (-1, 0), (0, VIEWS), (0, -1)])
def test_a_row_that_does_not_exist_is_refused(index, view):
    plan = planned("int8")
    rows = cache.in_memory(plan.rows, N * VIEWS, N, computed(plan))
    with pytest.raises(Refusal, match="index in"):
        rows.read(np.array([index]), view)


def test_a_row_on_the_device_that_does_not_exist_is_counted_and_refused():
    """The step counts it, a checked step refuses it, and so does the host."""
    batch, student, teacher = parts()
    plan = planned()
    rows = cache.in_memory(plan.rows, N * VIEWS, N, computed(plan))
    stage = cached_stage(plan)
    checked = hj.checked(stage)
    variables = cache.variables_of(teacher, cache.flat(rows.everything()))
    right = batch(np.arange(BATCH), 1)
    begin = functools.partial(stage.init, jax.random.key(0), student, variables)
    state = begin(right)
    for name, wrong, most in (("index", N, N), ("view", VIEWS, VIEWS), ("view", -1, 2)):
        given = {**right, name: right[name].at[3].set(wrong)}
        _, metrics = stage.update(jax.tree.map(jnp.copy, state), variables, given)
        assert metrics["cache/outside"] == 1 / BATCH
        said = f"'{name}' in 0..{most - 1}.* got {wrong}"
        with pytest.raises(Refusal, match=f"{said} at example 3"):
            checked.update(state, variables, given)
        with pytest.raises(Refusal, match=said):
            begin({**given, name: np.asarray(given[name])})
    # Positions in another split are no rows.
    evaluated = {**right, "index": right["index"] + N}
    del evaluated["view"]
    assert "cache/outside" not in checked.evaluate(state, variables, evaluated)
    few = cache.variables_of(teacher, cache.flat(rows.read(np.arange(N), 0)))
    with pytest.raises(Refusal, match="rows for 2 views of 24 examples, got .24. rows"):
        jax.eval_shape(stage.update, state, few, right)


def test_half_a_line_in_the_list_of_shards_is_left_out(tmp_path):
    (tmp_path / "shards.jsonl").write_text(json.dumps(["a", 1, 2]) + '\n["b", 1')
    assert shards._listed(tmp_path) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("method", "coding", "words"),
    [
        (hj.kd(4.0), "float16", "a coding among"),
        (
            hj.task(optax.softmax_cross_entropy_with_integer_labels),
            "int8",
            "learns from the teacher",
        ),
    ],
)
def test_a_cache_that_makes_no_sense_is_refused(method, coding, words):
    with pytest.raises(Refusal, match=words):
        planned(coding, method)


def test_a_batch_without_rows_says_where_they_come_from():
    batch, student, teacher = parts()
    plan = planned()
    stage = cached_stage(plan)
    with pytest.raises(Refusal, match="rows on the device"):
        stage.init(
            jax.random.key(0),
            student,
            cache.variables_of(teacher, None),
            batch(np.arange(8), 0),
        )
