"""CRD: two steps of the authors' code, and each kind of negatives by its formula."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import crd, crd_bytes
from hintjax.memory import MemoryBank
from hintjax.method import Context, Data
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
PAIR = ("guided", "hint")
HEADS = {"student": "embed_s", "teacher": "embed_t"}


def run(method, params, memory, student, teacher, batch, train=True, key=KEY):
    """Values' mean, gradients (parameters, student, teacher), memory, metrics."""

    def total(params, student, teacher, memory, batch, key):
        context = Context(key, jnp.int32(0), train)
        values, memory, metrics = method.apply(
            params,
            memory,
            Features(hints={"guided": student}),
            Features(hints={"hint": teacher}),
            batch,
            context,
        )
        return values.mean(), (values, memory, metrics)

    gradients = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    return gradients(params, student, teacher, memory, batch, key)


def heads(case, kind="param"):
    """Names of the official heads' parameters under ours."""
    return {
        ours: {
            "linear": {
                "kernel": f"{kind}.{theirs}.linear.weight",
                "bias": f"{kind}.{theirs}.linear.bias",
            }
        }
        for ours, theirs in HEADS.items()
    }


def bank_of(case, constants):
    return MemoryBank(
        case["state.contrast.memory_v1"], case["state.contrast.memory_v2"], *constants
    )


def published(case):
    """One step of the authors' code: what was trained, remembered and seen."""
    features = case.arrays["state.contrast.memory_v1"].shape[1]
    method = crd(PAIR, negatives=hj.GivenNegatives(), feature_dim=features)
    params = jax.tree.map(lambda name: case[name], heads(case))
    batch = {"index": case["int.idx"], "candidates": case["int.contrast_idx"]}
    batch["label"] = jnp.zeros_like(batch["index"])
    return method, params, batch


def started(method, size, student, teacher):
    """The memory that a stage would start with."""
    shapes = Features(hints={"guided": student}), Features(hints={"hint": teacher})
    labels = jnp.arange(size, dtype=jnp.int32) % 5
    return jax.jit(
        lambda key, labels: method.init(key, *shapes, Data(labels)),
    )(KEY, labels)


def test_two_steps_are_the_code(golden):
    """Loss, gradients, both banks and both Z; the second step from the first's."""
    case = golden("crd/step1_exact_Z_unset")
    method, params, batch = published(case)
    _, memory = started(method, 50, case["in.f_s"], case["in.f_t"])
    unset = memory["bank"].student_constant, memory["bank"].teacher_constant
    assert np.isneginf(unset).all()
    memory["bank"] = bank_of(case, unset)
    for name in ("crd/step1_exact_Z_unset", "crd/step2_exact_Z_set"):
        case = golden(name)
        _, _, batch = published(case)
        constants = memory["bank"][2:]
        memory = check_step(case, method, params, memory, batch)
    np.testing.assert_array_equal(memory["bank"][2:], constants)


def test_the_published_size_is_the_code(golden):
    case = golden("crd/feat128_K64")
    method, params, batch = published(case)
    _, memory = started(method, 200, case["in.f_s"], case["in.f_t"])
    memory["bank"] = bank_of(case, memory["bank"][2:])
    check_step(case, method, params, memory, batch)


def check_step(case, method, params, memory, batch):
    (by_params, by_student, by_teacher), (values, memory, _) = run(
        method, params, memory, case["in.f_s"], case["in.f_t"], batch
    )
    assert case.error("out.loss", np.mean(values)) < 1e-5
    assert case.error("grad.in.f_s", by_student) < 1e-5
    assert case.error("grad.in.f_t", by_teacher) < 1e-5
    names = heads(case, "grad.param")
    errors = jax.tree.map(case.error, names, by_params)
    assert max(jax.tree.leaves(errors)) < 1e-5
    bank = memory["bank"]
    assert case.error("state_out.contrast.memory_v1", bank.student) < 1e-5
    assert case.error("state_out.contrast.memory_v2", bank.teacher) < 1e-5
    constants = [float(np.exp(c)) for c in bank[2:]]
    name = "state_out.contrast.params"
    name = name if name in case.arrays else "state.contrast.params"
    np.testing.assert_allclose(constants, case.arrays[name][2:4], rtol=1e-5)
    return memory


SIZE, BATCH, T = 40, 6, 0.5


def features(seed, width):
    generator = np.random.default_rng(seed)
    return jnp.array(generator.normal(size=(BATCH, width)), jnp.float32)


STUDENT, TEACHER = features(0, 7), features(1, 9)
INDEX = np.array([3, 17, 4, 39, 0, 22], np.int32)
KNOWN = {"index": jnp.array(INDEX), "label": jnp.array(INDEX % 5)}


@functools.cache
def made(negatives, **options):
    method = crd(PAIR, negatives=negatives, temperature=T, feature_dim=8, **options)
    return method, *started(method, SIZE, STUDENT, TEACHER)


def embedded(params):
    """Both embeddings, in double precision."""
    for name, x in (("student", STUDENT), ("teacher", TEACHER)):
        kernel, bias = (
            np.float64(params[name]["linear"][part]) for part in ("kernel", "bias")
        )
        y = np.float64(x) @ kernel + bias
        yield y / np.linalg.norm(y, axis=1, keepdims=True)


def formula(positive, negatives, log_constant):
    """The published form of one direction: negatives by anchor, of any number."""
    if np.isneginf(log_constant):
        everything = np.concatenate([positive, *negatives])
        log_constant = np.log(np.exp(everything / T).mean() * SIZE)
    values = []
    for own, others in zip(positive, negatives, strict=True):
        share = len(others) / SIZE
        c = share + 1e-7
        p = np.exp(own / T) / np.exp(log_constant)
        q = np.exp(others / T) / np.exp(log_constant)
        values.append(-np.log(p / (p + c)) - np.log(share / (q + c)).sum())
    return np.array(values)


def expected(params, bank, positive, negatives):
    """Both directions, for positives and lists of negatives in the bank."""
    s, t = embedded(params)
    total = 0.0
    for anchors, vectors, constant in (
        (s, np.float64(bank.teacher), bank.student_constant),
        (t, np.float64(bank.student), bank.teacher_constant),
    ):
        own = (anchors * vectors[positive]).sum(1)
        others = [
            vectors[index] @ anchor
            for anchor, index in zip(anchors, negatives, strict=True)
        ]
        total = total + formula(own, others, constant)
    return total


def drawn(negatives, classes):
    """The draws of a step, and those that count for each anchor."""
    draws, _ = jax.random.split(KEY)
    found = jax.jit(negatives.draw)(classes, draws, KNOWN)
    index = np.broadcast_to(found.index, found.valid.shape)
    return [row[keep] for row, keep in zip(index, np.array(found.valid), strict=True)]


@pytest.mark.parametrize("count", [5, 30])  # gathered; all scored
@pytest.mark.parametrize("kind", [hj.AnchorNegatives, hj.SharedNegatives])
def test_draws_from_the_bank_are_the_formula(kind, count):
    negatives = kind(count)
    method, params, memory = made(negatives)
    _, (values, _, _) = run(method, params, memory, STUDENT, TEACHER, KNOWN)
    chosen = drawn(negatives, memory["classes"])
    for anchor, others in zip(INDEX, chosen, strict=True):
        assert np.all(others % 5 != anchor % 5)
    if kind is hj.SharedNegatives:  # own-class draws do not count, anchor by anchor
        assert len({len(others) for others in chosen}) > 1
    want = expected(params, memory["bank"], INDEX, chosen)
    np.testing.assert_allclose(values, want, rtol=1e-5)


def test_negatives_in_the_batch_are_the_formula():
    method, params, memory = made(hj.BatchNegatives())
    assert memory["bank"].student.shape == (0, 8)
    _, (values, after, _) = run(method, params, memory, STUDENT, TEACHER, KNOWN)
    s, t = embedded(params)
    labels = np.asarray(KNOWN["label"])
    others = [labels != label for label in labels]
    assert {int(o.sum()) for o in others} == {4, 5}
    total = 0.0
    for scores in (s @ t.T, t @ s.T):
        negatives = [row[keep] for row, keep in zip(scores, others, strict=True)]
        total = total + formula(np.diagonal(scores), negatives, -np.inf)
    np.testing.assert_allclose(values, total, rtol=1e-5)
    assert np.isfinite(after["bank"][2:]).all()


def test_relaxed_positives_are_of_the_anchors_class():
    negatives = hj.SharedNegatives(30)
    method, params, memory = made(negatives, relax=True)
    _, (values, _, _) = run(method, params, memory, STUDENT, TEACHER, KNOWN)
    chosen = drawn(negatives, memory["classes"])
    candidates = np.array(
        [
            expected(params, memory["bank"], (INDEX % 5) + 5 * row, chosen)
            for row in range(SIZE // 5)
        ]
    )
    # Z depends on all positives a little: near one candidate is enough here.
    assert np.all(np.abs(candidates - np.array(values)).min(0) < 0.05)


def test_the_bank_moves_and_the_constants_are_set_in_training_alone():
    method, params, memory = made(hj.SharedNegatives(30))
    _, (_, evaluated, _) = run(
        method, params, memory, STUDENT, TEACHER, KNOWN, train=False
    )
    for before, after in zip(memory["bank"], evaluated["bank"], strict=True):
        np.testing.assert_array_equal(before, after)
    _, (_, first, _) = run(method, params, memory, STUDENT, TEACHER, KNOWN)
    others = np.setdiff1d(np.arange(SIZE), INDEX)
    for name in ("student", "teacher"):
        before, after = (np.asarray(getattr(m["bank"], name)) for m in (memory, first))
        np.testing.assert_array_equal(before[others], after[others])
        assert np.all(np.abs(before - after)[INDEX].max(1) > 0.01)
    assert np.isfinite(first["bank"][2:]).all()
    key = jax.random.key(7)
    _, (_, second, _) = run(method, params, first, STUDENT, TEACHER, KNOWN, key=key)
    np.testing.assert_array_equal(first["bank"][2:], second["bank"][2:])


def test_masked_examples_leave_no_trace():
    """Not in the values of the others, not in Z, not in the bank."""
    method, params, memory = made(hj.SharedNegatives(30))
    where = np.arange(BATCH) != 2
    batch = {**KNOWN, "where": where}
    broken = np.array(STUDENT)
    broken[2] = np.nan
    _, (values, after, metrics) = run(method, params, memory, broken, TEACHER, batch)
    few = {name: np.asarray(entry)[where] for name, entry in KNOWN.items()}
    _, (want, kept, _) = run(
        *(method, params, memory, np.asarray(STUDENT)[where]),
        *(np.asarray(TEACHER)[where], few),
    )
    values, after, memory = jax.device_get((values, after, memory))
    np.testing.assert_allclose(values[where], want, rtol=1e-5)
    assert values[2] == 0
    for got, of in zip(after["bank"], kept["bank"], strict=True):
        np.testing.assert_allclose(got, of, rtol=1e-5)
    np.testing.assert_array_equal(after["bank"].student[4], memory["bank"].student[4])
    assert np.isfinite(metrics["positive"])


def test_what_is_no_number_is_not_remembered():
    method, params, memory = made(hj.SharedNegatives(30))
    broken = np.array(STUDENT)
    broken[2] = np.nan
    _, (values, after, _) = run(method, params, memory, broken, TEACHER, KNOWN)
    np.testing.assert_array_equal(np.isnan(values), np.arange(BATCH) == 2)
    after, memory = jax.device_get((after, memory))
    for rows, before in zip(after["bank"][:2], memory["bank"][:2], strict=True):
        np.testing.assert_array_equal(rows[INDEX[2]], before[INDEX[2]])
        assert np.all(np.isfinite(rows))
    assert np.isfinite(after["bank"][2:]).all()


@pytest.mark.parametrize("kind", [hj.AnchorNegatives, hj.SharedNegatives])
def test_the_bank_is_written_in_place(kind):
    """A donated bank is not copied, when candidates are gathered; nor is it by what
    takes an update back."""
    method, params, memory = made(kind(5))

    def step(bank, classes):
        context = Context(KEY, jnp.int32(0), True)
        shown = Features(hints={"guided": STUDENT}), Features(hints={"hint": TEACHER})
        before = {"bank": bank, "classes": classes}

        def total(params):
            values, after, _ = method.apply(params, before, *shown, KNOWN, context)
            return values.sum(), after

        slopes, after = jax.grad(total, has_aux=True)(params)
        good = jnp.isfinite(jax.tree.leaves(slopes)[0]).all()
        return slopes, method.select(good, after, before, KNOWN)["bank"]

    compiled = jax.jit(step, donate_argnums=0).lower(*memory.values()).compile()
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if f"f32[{SIZE},8]" in line]


def test_an_evaluated_example_is_compared_with_itself_and_not_with_the_bank():
    """Its index is of another split: it stands for nothing in the bank."""
    method, params, memory = made(hj.SharedNegatives(30))
    other = {**KNOWN, "index": KNOWN["index"] + 1000}
    shown = [
        run(method, params, memory, STUDENT, TEACHER, batch, train=False)[1]
        for batch in (KNOWN, other)
    ]
    np.testing.assert_array_equal(shown[0][0], shown[1][0])
    s, t = embedded(params)
    np.testing.assert_allclose(
        shown[1][2]["positive"], (s * t).sum(1).mean(), rtol=1e-5
    )


def test_one_class_has_no_negatives_and_is_still_a_number():
    for negatives in (hj.AnchorNegatives(4), hj.SharedNegatives(4)):
        method, params, memory = made(negatives)
        memory = {
            **memory,
            "classes": memory["classes"]._replace(label=jnp.zeros(SIZE, jnp.int32)),
        }
        batch = {**KNOWN, "label": jnp.zeros(BATCH, jnp.int32)}
        gradients, (values, _, _) = run(method, params, memory, STUDENT, TEACHER, batch)
        leaves = [np.asarray(x) for x in jax.tree.leaves((gradients, values))]
        assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("wrong", [SIZE, -1, 2**31 - 1])
def test_an_index_outside_of_the_data_is_counted_and_not_remembered(wrong):
    method, params, memory = made(hj.SharedNegatives(30))
    index = INDEX.copy()
    index[3] = wrong
    batch = {**KNOWN, "index": index, "where": np.arange(BATCH) != 1}
    _, (_, after, metrics) = run(method, params, memory, STUDENT, TEACHER, batch)
    np.testing.assert_allclose(metrics["outside"], 1 / (BATCH - 1), rtol=1e-6)
    banks = jax.device_get((after["bank"].student, memory["bank"].student))
    moved = np.abs(banks[0] - banks[1]).max(1) > 0
    others = np.delete(np.asarray(KNOWN["index"]), [1, 3])
    np.testing.assert_array_equal(np.flatnonzero(moved), np.sort(others))
    _, (_, _, metrics) = run(method, params, memory, STUDENT, TEACHER, KNOWN)
    assert metrics["outside"] == 0


@pytest.mark.parametrize("negatives", [hj.AnchorNegatives(4), hj.SharedNegatives(4)])
def test_labels_that_contradict_the_data_are_counted(negatives):
    method, params, memory = made(negatives)
    where = np.arange(BATCH) != 1
    label = INDEX % 5
    label[[1, 2]] += 1
    _, (_, _, metrics) = run(
        method,
        params,
        memory,
        STUDENT,
        TEACHER,
        {**KNOWN, "label": label} | {"where": where},
    )
    np.testing.assert_allclose(metrics["mislabeled"], 1 / (BATCH - 1), rtol=1e-6)
    assert metrics["outside"] == 0
    index = INDEX.copy()
    index[3] = SIZE  # which is outside, and has no label
    for batch in (KNOWN, {**KNOWN, "index": jnp.array(index)}):
        found = hj.objective(a=method).mislabeled({"a": memory}, batch)
        assert not np.any(found)
    evaluated = run(method, params, memory, STUDENT, TEACHER, KNOWN, train=False)
    assert "mislabeled" not in evaluated[1][2]


def test_candidates_outside_of_the_data_are_counted():
    given = crd(PAIR, negatives=hj.GivenNegatives("some"), feature_dim=8)
    _, params, memory = made(hj.SharedNegatives(30))
    assert given.limits(memory) == {"index": SIZE, "some": SIZE}
    some = jnp.zeros((BATCH, 4), jnp.int32).at[2, 3].set(SIZE)
    batch = {**KNOWN, "some": some}
    _, (_, _, metrics) = run(given, params, memory, STUDENT, TEACHER, batch)
    np.testing.assert_allclose(metrics["outside"], 1 / BATCH, rtol=1e-6)
    within = crd(PAIR, negatives=hj.BatchNegatives())
    assert within.limits is None


@pytest.mark.parametrize("negatives", [hj.AnchorNegatives(4), hj.BatchNegatives()])
def test_labels_of_one_class_are_refused(negatives):
    method = hj.objective(crd=crd(PAIR, negatives=negatives))
    for labels in (np.zeros(9, np.int32), jnp.full(9, 3)):
        with pytest.raises(ValueError, match="crd: expected labels of several classes"):
            method.check(Data(labels))
    method.check(Data(np.arange(9) % 2))
    # Labels that are shapes alone are checked when a run begins.
    method.check(Data(jax.ShapeDtypeStruct((9,), jnp.int32)))
    assert hj.objective(crd=crd(PAIR, negatives=hj.GivenNegatives())).check is None
    only_watched = hj.weighted(crd(PAIR, negatives=negatives), 0)
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    assert hj.objective(crd=only_watched, task=task).check is None


def test_it_is_told_what_it_needs():
    method = crd(PAIR)
    shapes = Features(hints={"guided": STUDENT}), Features(hints={"hint": TEACHER})
    with pytest.raises(ValueError, match="crd: expected the training set's labels"):
        method.init(KEY, *shapes, None)
    given = crd(PAIR, negatives=hj.GivenNegatives("idx"), feature_dim=8)
    _, params, memory = made(hj.SharedNegatives(30))
    with pytest.raises(ValueError, match="crd: expected 'idx' in the batch"):
        run(given, params, memory, STUDENT, TEACHER, KNOWN)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature to be > 0"),
        ({"momentum": 1.5}, r"momentum in \[0, 1\]"),
        ({"feature_dim": 0}, "feature_dim to be an integer >= 1"),
        ({"relax": True, "negatives": hj.BatchNegatives()}, "relax=True only with"),
        ({"relax": True, "negatives": hj.GivenNegatives()}, "relax=True only with"),
    ],
)
def test_what_makes_no_sense_is_refused(options, match):
    with pytest.raises(ValueError, match=f"crd: expected {match}"):
        crd(PAIR, **options)


def test_memory_is_estimated():
    sizes = {"size": 1_000_000, "batch": 64}
    anchor = crd_bytes(hj.AnchorNegatives(16384), **sizes)
    shared = crd_bytes(hj.SharedNegatives(16384), **sizes)
    assert anchor["bank"] == shared["bank"] == 2 * 1_000_000 * 128 * 4
    assert anchor["step"] == 2 * 4 * (64 * 16384 * 128 + 64 * 16384)
    assert shared["step"] == 2 * 4 * (16384 * 128 + 64 * 16384)
    few = crd_bytes(hj.GivenNegatives(), size=50_000, batch=64)
    assert few["step"] == 2 * 4 * (64 * 50_000 + 64 * 16384)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(self.width, name="body")(x.reshape(len(x), -1)))
        return nn.Dense(5, name="head")(x)


@pytest.mark.parametrize("make", ["hint", "distillation"])
def test_it_learns_in_both_stages_beside_others(make):
    """One trace; the bank follows; every loss falls when one batch is repeated."""
    student, teacher = hj.linen(Net(6)), hj.linen(Net(9))
    images = np.random.default_rng(0).normal(size=(BATCH, 2, 2, 1))
    batch = {"image": images.astype(np.float32), **KNOWN}
    terms = {"crd": crd(("body", "body"), negatives=hj.SharedNegatives(64))}
    stage = hj.hint_stage
    if make == "distillation":
        stage, terms["kd"] = hj.distillation_stage, hj.kd()
    stage = stage(student, teacher, hj.objective(**terms), optax.adam(0.02))
    ours, theirs = (
        jax.jit(net.init)(KEY, batch["image"]) for net in (student, teacher)
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's own mathematics
        with pytest.raises(ValueError, match="crd: expected the training set's labels"):
            stage.init(KEY, ours, theirs, batch)
        data = Data(np.arange(SIZE, dtype=np.int32) % 5)
        with pytest.raises(ValueError, match="labels of several classes, got 9 labels"):
            stage.init(KEY, ours, theirs, batch, data=Data(np.ones(9, np.int32)))
        wrong = {**batch, "index": np.where(np.arange(BATCH) == 2, SIZE, INDEX)}
        wanted = f"batch: expected 'index' in 0..{SIZE - 1}, .* got {SIZE}"
        with pytest.raises(ValueError, match=wanted):
            stage.init(KEY, ours, theirs, wrong, data=data)
        state = stage.init(KEY, ours, theirs, batch, data=data)
        before = jax.tree.map(np.array, state.memory["crd"]["bank"])
        chex.clear_trace_counter()  # chex counts by name
        step = jax.jit(
            chex.assert_max_traces(
                lambda state, batch: stage.step(
                    state, stage.teach(state, theirs, batch), batch
                ),
                n=1,
            )
        )
        history = []
        for _ in range(30):
            state, metrics = step(state, batch)
            history.append(metrics)
    assert history[-1]["crd"] < history[0]["crd"] - 1
    assert history[-1]["crd/positive"] > history[0]["crd/positive"] + 0.2
    bank = state.memory["crd"]["bank"]
    moved = np.abs(np.asarray(bank.student) - before.student).max(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(moved), np.sort(INDEX))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"index": jnp.arange(4.0)}, "crd: expected index to be integer"),
        ({"label": jnp.arange(4.0)}, "crd: expected label to be integer"),
        ({"candidates": jnp.ones((4, 3))}, "candidates to be integer .*float32"),
        ({"candidates": jnp.arange(4)}, r"candidates to be integer \(batch, 1 \+ K\)"),
    ],
)
def test_places_and_classes_are_integers(unchecked, entries, words):
    batch = {"index": jnp.arange(4), "label": jnp.arange(4) % 2, **entries}
    given = "candidates" in entries
    negatives = hj.GivenNegatives() if given else hj.SharedNegatives(2)
    method = crd(PAIR, negatives=negatives, feature_dim=2)
    shown = (Features(hints={name: jnp.ones((4, 3))}) for name in PAIR)
    student, teacher = shown
    data = Data(np.arange(9, dtype=np.int32) % 2)
    params, memory = method.init(KEY, student, teacher, data)
    context = Context(KEY, jnp.int32(0), True)
    with pytest.raises(hj.Refusal, match=words):
        jax.eval_shape(
            lambda: method.apply(params, memory, student, teacher, batch, context)[0]
        )
