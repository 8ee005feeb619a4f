"""The benchmarks run, and their numbers mean what they say; no test reads the clock."""

import ast
import json
import math
import sys
import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import data, methods
from hintjax.experiments.attachment import Places
from hintjax.experiments.config import Config
from hintjax.experiments.distill import claim, distill
from hintjax.experiments.setting import prepare
from hintjax.experiments.statistics import summary
from hintjax.pairing import Candidate, Measured

if find_spec("tensorflow"):
    # Keras defines a class of unpicklers, so it is imported before `no_pickle`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("tensorflow")

PROGRAMS = ("alone", "step")
MICRO = find_spec("tflite_micro") is not None
FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """`script(name)` imports a benchmark as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield import_module


@pytest.fixture(scope="module")
def small_steps(script):
    """Every program of the small case of `step_time`, by name."""
    step_time = script("step_time")
    return step_time._steps(step_time._options(["--small"]))


def positive(summary):
    values = [summary[key] for key in ("low", "median", "high")]
    return values == sorted(values) and values[0] > 0 and math.isfinite(values[-1])


@pytest.mark.long
def test_step_time_measures_methods_against_their_parts(script, tmp_path):
    step_time = script("step_time")
    file = tmp_path / "results.json"
    arguments = ["--small", "--rounds", "6", "--methods", "hint_stage"]
    step_time.main([*arguments, "--out", str(file)])
    record = json.loads(file.read_text())
    assert list(record["ratios"]) == [
        "hint_stage",
        "hint_stage / cut networks",
        "hint_stage / fitnets",
    ]
    for row in record["ratios"].values():
        assert positive(row["time"])
        assert {row["whole"], *row["parts"]} <= {*record["programs"]}
    for program in record["programs"].values():
        assert program["compile_seconds"] > 0
        assert len(program["rounds"]) == record["rounds"] == 6
        assert positive(program["step_seconds"])
    assert {"date", "device", "processor", "versions"} <= {*record["machine"]}
    # The compiler's counts do not depend on the load of the machine.
    assert record["ratios"]["hint_stage"]["flops"] <= step_time.BAR
    cut = record["ratios"]["hint_stage / cut networks"]["flops"]
    assert cut == pytest.approx(1, abs=0.02)
    assert record["ratios"]["hint_stage / fitnets"]["flops"] < 1

    step_time.main(["--plot", str(file)])
    assert file.with_suffix(".png").stat().st_size < 100_000


@pytest.mark.parametrize(
    "name",
    [
        "task_fusion",
        "task_heads",
        "task_translator",
        "teach_output",
        "variational",
        "teach_pool:in",
        "kd",
        "attention_transfer",
        "crd",
        "factor_transfer",
        "review",
    ],
)
def test_the_other_programs_of_step_time_trace(small_steps, name):
    def stepped():
        step, state, rest = small_steps[name]()
        return state, step(state, *rest)[0]

    # With other shapes or types, the second step would be compiled again.
    before, after = jax.eval_shape(stepped)
    assert after == before


def test_every_method_has_a_row_or_a_reason(script):
    step_time = script("step_time")
    exported = {name: getattr(methods, name) for name in methods.__all__}
    published = {
        name
        for name, one in exported.items()
        if getattr(one, "__annotations__", {}).get("return") is hj.Method
    }
    assert {"crd", "fsp", "kd", "review"} <= published
    have = {name.partition(":")[0] for name in step_time.terms()}
    assert published <= have | set(step_time.LEFT_OUT)
    assert not have & set(step_time.LEFT_OUT)
    assert {*step_time.CORE} <= {*step_time._options(["--methods", "all"]).methods}


def test_every_part_of_a_row_is_a_program(script, small_steps):
    step_time = script("step_time")
    rows = step_time.rows(step_time.terms())
    assert {*step_time.terms()} <= {*rows}
    assert {name for row in rows.values() for name in (row.whole, *row.parts)} == {
        *small_steps
    }
    bars = {name: rows[name].bar for name in step_time.CORE}
    assert bars == dict.fromkeys(step_time.CORE, 1.05) | dict.fromkeys(
        ("fsp", "crd", "review"), 1.15
    )
    assert rows["review"].parts == ("teach_pool", "task_fusion")
    assert rows["fsp"].parts == ("teach_group3", "task")


def test_plain_flax_takes_the_same_step_as_the_task_stage(small_steps):
    steps = small_steps
    (plain, *ours), (task, *theirs) = steps["plain"](), steps["task"]()
    (_, stats, opt_state), _ = plain(ours[0], *ours[1])
    state, _ = task(theirs[0], *theirs[1])
    # The optimizer's trace holds the gradients, at any learning rate.
    for a, b in [(opt_state, state.opt_state), (stats, state.state)]:
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_cut_network_ends_with_the_hint(script):
    step_time = script("step_time")
    module, images = step_time.wrn_10_1(classes=5), jnp.ones((2, 8, 8, 3))
    network = hj.linen(module)
    variables = network.init(jax.random.key(0, impl="rbg"), images)
    short, restricted = step_time._cut(module, "group2", variables)
    assert set(restricted.params) == {"stem", "group1", "group2"}

    def show(network, variables, wants):
        apply = jax.jit(partial(network.apply, wants=wants, train=False))
        return apply(*variables, images)[0]

    hint = show(network, variables, hj.Wants(hints=("group2",))).hints["group2"]
    output = show(short, restricted, hj.Wants(output=True)).output
    np.testing.assert_allclose(output, hint, rtol=1e-5)


@pytest.mark.long
def test_pairs_measures_every_form_against_the_loop(script, tmp_path):
    pairs = script("pairs")
    file = tmp_path / "results.json"
    pairs.main(["--small", "--rounds", "6", "--out", str(file)])
    record = json.loads(file.read_text())
    assert set(record["losses"]) == {"attention", "hint"}
    for name, counts in record["losses"].items():
        assert [count["pairs"] for count in counts] == [1, 2]
        for count in counts:
            assert set(count) == {"pairs", *pairs.FORMS[name]}
            for form in pairs.FORMS[name]:
                assert positive(count[form]["over_loop"])
    pairs.main(["--plot", str(file)])
    assert file.with_suffix(".png").stat().st_size < 100_000


@pytest.mark.long
def test_students_of_a_population_are_measured_against_one_alone(script, tmp_path):
    population = script("population")
    file = tmp_path / "results.json"
    population.main(["--small", "--rounds", "6", "--out", str(file)])
    record = json.loads(file.read_text())
    assert set(record["networks"]) == set(population.NETWORKS) == {"cnn", "vit"}
    for found in record["networks"].values():
        assert positive(found["alone"]["step_seconds"])
        assert set(found["students"]) == {"together 2", "apart 2", "mesh 2"}
        for student in found["students"].values():
            assert positive(student["cost"])
        # Students share the teacher's work; each of two devices has one student.
        flops = {name: student["flops"] for name, student in found["students"].items()}
        shared = 1 - found["teach"]["flops"] / found["alone"]["flops"] / 2
        assert flops["together 2"] == pytest.approx(shared, rel=0.05)
        assert flops["apart 2"] == pytest.approx(shared, rel=0.05)
        assert flops["mesh 2"] == pytest.approx(shared / 2, rel=0.05)


@pytest.mark.long
def test_training_with_the_rounding_is_measured_against_training_without(
    script, tmp_path
):
    quantization = script("quantization")
    file = tmp_path / "results.json"
    quantization.main(["--small", "--seeds", "2", "--out", str(file)])
    record = json.loads(file.read_text())
    assert len(record["runs"]) == 2 and set(record["gain"]) == {"4"}
    for run in record["runs"]:
        found = [run["float"], run["continued"], *run["bits"]["4"].values()]
        assert all(0 <= accuracy <= 1 for accuracy in found)
    differences = [
        run["bits"]["4"]["aware"] - run["bits"]["4"]["continued"]
        for run in record["runs"]
    ]
    gain = record["gain"]["4"]["mean"]
    assert gain == pytest.approx(np.mean(differences), abs=1e-4)


@pytest.mark.long
def test_micro_batches_are_measured_against_the_whole_batch(script, tmp_path):
    accumulation = script("accumulation")
    file = tmp_path / "results.json"
    accumulation.main(["--small", "--rounds", "6", "--out", str(file)])
    record = json.loads(file.read_text())
    assert set(record["programs"]) == set(record["ratios"]) == {"1", "2"}
    one, two = (record["programs"][count] for count in ("1", "2"))
    assert positive(one["step_seconds"])
    assert two["flops"] == pytest.approx(one["flops"], rel=0.05)
    assert positive(record["ratios"]["2"])


@pytest.mark.long
def test_cached_teachers_are_measured_against_the_student_alone(script, tmp_path):
    cache = script("cache")
    file = tmp_path / "results.json"
    arguments = ["--small", "--rounds", "6", "--methods", "attention_transfer"]
    cache.main([*arguments, "--out", str(file)])
    (one,) = json.loads(file.read_text())["methods"].values()
    assert set(one["programs"]) == {"live", "float32", "bfloat16", "student"}
    assert one["bytes_per_image"] == {"float32": 336, "bfloat16": 168, "int8": 96}
    over = one["over_student"]
    assert all(positive(row["time"]) for row in over.values())
    # The compiler's counts do not depend on the load of the machine.
    assert over["live"]["flops"] > 1.2
    assert 1 <= over["float32"]["flops"] <= over["float32"]["bar"] == cache.BAR
    terms = script("step_time").terms()
    assert {*cache.METHODS} - {"hint_stage"} <= {*terms}


@pytest.mark.long
def test_fixed_views_are_compared_with_new_crops(script, tmp_path, monkeypatch):
    views = script("views")
    file = tmp_path / "results.json"
    arguments = ["--small", "--work", str(tmp_path / "work"), "--out", str(file)]
    record = views.main(arguments)
    arms, accuracy = record["arms"], record["test_accuracy"]
    assert set(arms) == {"none", "live", "2"}
    assert set(accuracy) == {*arms, "teacher"}
    for name, one in arms.items():
        assert one["mean"] == pytest.approx(sum(accuracy[name]) / 2)
    assert arms["live"]["minus_live"]["mean"] == 0
    assert json.loads(file.read_text())["minutes"] > 0
    monkeypatch.setattr(views, "run", None)  # finished runs are not run again
    assert views.main(arguments)["test_accuracy"] == accuracy


def test_the_arms_of_a_suggestion_differ_in_their_pairs(script):
    suggestion = script("suggestion")

    def convs(count):
        layer = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
        return {f"conv{number}": layer for number in range(1, count + 1)}

    places = Places(convs(20), convs(6))
    measured = [("conv13", "conv4"), ("conv7", "conv2"), ("conv13", "conv4")]
    pairs = suggestion.pairs_of(places, measured)
    assert list(pairs) == list(suggestion.ARMS)
    assert pairs["suggestion"] == measured
    assert pairs["middle third"] == [("conv10", "conv3")] * 3
    assert pairs["last stage"] == [("conv20", "conv6")] * 3
    assert pairs["no hint"] == [None] * 3
    # More seeds keep the random pairs of the first seeds.
    drawn = suggestion.pairs_of(places, measured * 9)["random"]
    assert drawn[:3] == pairs["random"] and len(set(drawn)) > 9
    assert set(drawn) <= set(suggestion.fitting_pairs(places))
    # No regressor of maps fits tokens.
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 9, 4), jnp.float32)}
    mixed = suggestion.fitting_pairs(Places(convs(3), convs(2) | tokens))
    assert {hint for _, hint in mixed} == {"conv1", "conv2"} and len(mixed) == 6


def test_a_suggestion_sees_the_training_images_of_the_student_alone(
    script, monkeypatch
):
    suggestion = script("suggestion")
    wide = "hintjax.models:plain_wide"
    config = Config(student=wide, teacher=wide, limit=40, devices=1)
    setting = prepare(config, teach=True)
    given = []

    def measured(setting, teacher, batches):
        given.append((setting.config.seed, teacher, batches))
        usual = {"guided_depth": 0.5, "depth": 0.5, "shape": (4,), "cost": 0.5}
        one = Candidate(
            "conv2", "conv1", regressor=9, probe=0.9, explained=0.0, **usual
        )
        return Measured((one,), 0.1, ("conv1",), ("conv2",), np.eye(2))

    monkeypatch.setattr(suggestion, "measured", measured)
    found = suggestion.suggestion(setting, "the teacher", 3)
    assert found["pair"] == ("conv2", "conv1") and json.dumps(found)
    ((seed, teacher, batches),) = given
    assert (seed, teacher) == (3, "the teacher")
    seen = np.concatenate([one["image"][one["where"]] for one in batches])
    train = data.take(setting.dataset.train, np.arange(40), setting.dataset.standardize)
    sums = [np.sort(images.sum((1, 2, 3))) for images in (seen, train["image"])]
    np.testing.assert_allclose(*sums, rtol=1e-5, atol=1e-5)


def test_a_run_of_a_suggestion_has_this_pair_and_as_many_epochs(script):
    suggestion = script("suggestion")
    layer = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    layers = {f"conv{number}": layer for number in range(1, 6)}
    places = Places(layers, layers, examples=40)
    for pair in (("conv4", "conv2"), None):
        phases = suggestion.recipe_of(pair)(Config(epochs=6), places, 5)
        *before, last = phases
        assert sum(phase.epochs for phase in phases) == 6
        assert last.name == "soft_targets" and last.method.student.hints == ()
        seen = [
            (one.method.student.hints, one.method.teacher.hints, one.epochs)
            for one in before
        ]
        assert seen == ([] if pair is None else [(("conv4",), ("conv2",), 3)])


@pytest.mark.long
def test_a_suggestion_is_compared_with_other_pairs(script, tmp_path, monkeypatch):
    suggestion = script("suggestion")
    file = tmp_path / "results.json"
    work = ["--networks", "small", "--work", str(tmp_path / "work"), "--seeds"]
    tiny = ["--limit", "32", "--epochs", "2", "--teacher-epochs", "1", "--rates"]
    arguments = ["--out", str(file), *tiny, "1e-3", "3e-3", *work]
    record = suggestion.main([*arguments, "2"])
    found = json.loads(file.read_text())["networks"]["small"]
    assert set(found["arms"]) == set(suggestion.ARMS)
    accuracy = record["networks"]["small"]["test_accuracy"]
    for arm, less in found["suggestion_minus"].items():
        both = accuracy["suggestion"], accuracy[arm]
        assert less["mean"] == pytest.approx(np.subtract(*both).mean(), abs=1e-4)
    # The validation split chooses one rate for all arms.
    results = {
        (path.parent.parent.name, path.parent.name): json.loads(path.read_text())
        for path in (tmp_path / "work/small/runs").glob("*/*/result.json")
    }
    rate = found["rate"]
    assert found["validation"][f"{rate:g}"] == max(found["validation"].values())
    alone = [results["none", f"rate{rate:g}-seed{seed}"] for seed in (0, 1)]
    assert accuracy["no hint"] == [one["test/accuracy"] for one in alone]

    monkeypatch.setattr(suggestion, "run", None)  # finished runs are not run again
    again = suggestion.main([*arguments, "2"])["networks"]["small"]
    assert again["test_accuracy"] == accuracy
    with pytest.raises(SystemExit, match="other options"):
        suggestion.main([*arguments, "2", "--batch", "8"])


def test_the_readme_shows_the_numbers_of_the_pretrained_teacher():
    root = Path(__file__).parent.parent
    file = root / "benchmarks" / "results" / "foundation_cpu.json"
    record = json.loads(file.read_text())
    assert not record["unfinished"]
    runs = record["runs"]
    titles = {
        "from scratch, labels alone": ("scratch", "test"),
        "KD from a probe of the teacher's features": ("kd", "test"),
        "hints, then the task": ("hints_tune", "test"),
        "hints, then KD": ("hints_kd", "test"),
        "*probe of the frozen hint student*": ("frozen", "hints"),
        "*probe of the frozen teacher*": ("frozen", "teacher"),
    }
    page = (root / "README.md").read_text()
    for title, (arm, of) in titles.items():
        cells = []
        for seeds in runs[arm].values():
            values = [seed[of] for seed in seeds.values()]
            if arm == "frozen":
                values = [value["probe"] for value in values]
            spread = summary(values)
            cells.append(f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f}")
        assert f"| {title} | {' | '.join(cells)} |" in page


def test_the_page_shows_the_differences_with_the_pretrained_teacher():
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    record = json.loads((results / "foundation_cpu.json").read_text())
    page = (results / "README.md").read_text()
    for title, pair in (
        ("hints, then KD − KD", "hints_kd - kd"),
        ("hints, then the task − KD", "hints_tune - kd"),
        ("hints, then the task − from scratch", "hints_tune - scratch"),
        ("KD − from scratch", "kd - scratch"),
    ):
        cells = []
        for labels in ("10", "100", "1000"):
            one = record["differences"][pair][labels]
            mean, low, high = (100 * one[key] for key in ("mean", "low", "high"))
            cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        assert f"| {title} | {' | '.join(cells)} |" in page


def test_differences_of_arms_are_paired_by_seed(script):
    foundation = script("foundation")
    runs = {
        "kd": {"10": {str(seed): {"test": 0.1 * seed} for seed in range(3)}},
        "hints_kd": {"10": {str(seed): {"test": 0.1 * seed + 0.2} for seed in (2, 1)}},
        "scratch": {"10": {"0": {"test": 0.5}}},  # one seed has no interval
    }
    found = foundation.differences(runs)
    assert list(found) == ["hints_kd - kd"]
    assert found["hints_kd - kd"]["10"]["count"] == 2
    assert found["hints_kd - kd"]["10"]["mean"] == pytest.approx(0.2)
    assert found["hints_kd - kd"]["10"]["low"] == pytest.approx(0.2)


@pytest.mark.long
def test_a_student_of_few_labels_never_reads_the_hidden_ones(
    script, tmp_path, monkeypatch
):
    foundation = script("foundation")
    work, other = tmp_path / "work", tmp_path / "other"
    arguments = ["--small", "--out", str(tmp_path / "results.json"), "--work"]
    record = foundation.main([*arguments, str(work)])
    runs = record["runs"]
    assert set(runs) == {*foundation.ARMS, "hints", "frozen"}
    assert all(0 <= runs[arm]["2"]["0"]["test"] <= 1 for arm in foundation.ARMS)
    assert {"untrained", "hints", "teacher"} < set(runs["frozen"]["2"]["0"])
    assert record["unfinished"] == []
    assert json.loads((tmp_path / "results.json").read_text())["images"]["train"] == 64
    assert (tmp_path / "results.png").stat().st_size > 0
    with pytest.raises(SystemExit, match="other options"):
        foundation.main([*arguments, str(work), "--temperature", "2"])

    # The same images keep their labels; all others get a wrong one.
    with np.load(work / "images.npz") as file:
        images = dict(file)
    label, classes = images["train_label"], int(images["classes"])
    index = foundation.chosen(label, 2 * classes, 0)
    wrong = (label + 1) % classes
    wrong[index] = label[index]
    other.mkdir()
    np.savez(other / "images.npz", **images | {"train_label": wrong})
    monkeypatch.setattr(foundation, "chosen", lambda *given: index)
    changed = foundation.main([*arguments, str(other)])["runs"]
    assert without_seconds(changed) == without_seconds(runs)

    monkeypatch.setattr(foundation, "finish", None)  # finished runs are not run again
    assert foundation.main([*arguments, str(work)])["runs"] == runs


def without_seconds(runs):
    """The runs of `foundation`, by arm, labels and seed, without their times."""
    return {
        (arm, labels, seed): {key: one[key] for key in one if key != "seconds"}
        for arm, counts in runs.items()
        for labels, seeds in counts.items()
        for seed, one in seeds.items()
    }


@pytest.mark.long
def test_crd_negatives_are_measured_against_none(script, tmp_path):
    crd_negatives = script("crd_negatives")
    file = tmp_path / "results.json"
    arguments = ["--small", "--rounds", "6", "--kinds", "shared"]
    crd_negatives.main([*arguments, "--out", str(file)])
    record = json.loads(file.read_text())
    names = {f"{kind}, {one}" for kind in ("none", "shared") for one in PROGRAMS}
    assert set(record["programs"]) == names
    for program in record["programs"].values():
        assert positive(program["step_seconds"])
        assert program["temp_bytes"] >= 0
    assert list(record["over_none"]) == ["shared"]
    shared = record["over_none"]["shared"]
    assert positive(shared["time"])
    assert 1 <= shared["flops"] < shared["bar"] == 1.15


def test_gathering_as_published_gives_what_crd_gives(script):
    """Compares the loss, the gradients, and the banks after a step."""
    crd_negatives = script("crd_negatives")
    size, k, n = 64, 6, 3
    keys = jax.random.split(jax.random.key(0), 3)
    shown = [
        hj.Features(hints={"pool": jax.random.normal(key, (n, 5))}) for key in keys[:2]
    ]
    index, draws = np.array([3, 40, 7]), np.random.default_rng(0)
    labels = np.arange(size, dtype=np.int32) % 4
    candidates = crd_negatives._candidates(draws, labels, index, k)
    assert (labels[candidates[:, 1:]] != labels[index][:, None]).all()
    batch = {"index": index, "label": labels[index], "candidates": candidates}
    batch = jax.tree.map(jnp.asarray, batch)
    pair, data = crd_negatives.POOL, hj.Data(labels)
    gather = crd_negatives.gather(pair, feature_dim=8)
    ours = hj.crd(pair, negatives=methods.GivenNegatives(), feature_dim=8)
    params, theirs = gather.init(keys[2], *shown, data)
    _, memory = ours.init(keys[2], *shown, data)
    banks = {side: theirs[side]["bank"] for side in ("student", "teacher")}
    memory["bank"] = memory["bank"]._replace(**banks)
    context = hj.Context(keys[2], jnp.int32(0), True)

    def learn(method, memory):
        def loss(params):
            values, after, _ = method.apply(params, memory, *shown, batch, context)
            return values.mean(), (values, after)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    got, (values, after) = learn(gather, theirs)
    want, (expected, moved) = learn(ours, memory)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)
    for side in banks:
        bank = getattr(moved["bank"], side)
        np.testing.assert_allclose(after[side]["bank"], bank, rtol=1e-5)
        z = np.exp(getattr(moved["bank"], f"{side}_constant"))
        np.testing.assert_allclose(after[side]["z"], z, rtol=1e-5)


EDGE = [  # arm, file, bytes, accuracies, the aims that are missed
    ("teacher", "float", 1000, [0.98], []),
    ("teacher", "int8", 250, [0.976], ["int8"]),
    ("kd", "float", 101, [0.962, 0.98], ["smaller"]),
    ("kd", "int8", 100, [0.962, 0.982], []),
    ("fitnets", "float", 100, [0.96, 0.979], ["lost"]),
    ("fitnets", "int8", 50, [0.95, 0.98], ["lost", "int8"]),
]


def test_rows_of_the_edge_table_name_the_aims_that_they_miss(script):
    names = ("arm", "file", "bytes", "accuracy")
    rows = [dict(zip(names, one, strict=False)) for one in EDGE]
    judged = script("edge_table").judged(rows)
    assert [row["misses"] for row in judged] == [one[-1] for one in EDGE]
    whole, last = judged[0], judged[-1]
    assert [whole["smaller"], whole["lost"]] == [1, 0]
    assert whole["int8"] is None and whole["std"] is None
    assert last["smaller"] == 20 and last["mean"] == pytest.approx(0.965)
    assert last["std"] == pytest.approx(0.03 / math.sqrt(2))
    assert [last["lost"], last["int8"]] == pytest.approx([1.5, 0.45])
    assert script("edge_table").misses(last, lost=2.0) == ["int8"]


def test_networks_of_the_benchmarks_have_the_parameters_that_they_tell(script):
    networks = script("edge_networks")
    for make, shape in (
        (networks.teacher, (1, 28, 28, 1)),
        (networks.half, (1, 32, 32, 3)),
        (networks.thin, (1, 28, 28, 1)),
        (networks.resnet8, (1, 32, 32, 3)),
    ):
        net = hj.linen(make(10))
        shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        assert f"{count:,} parameters" in make.__doc__


def test_the_edge_table_names_the_network_of_a_teacher_and_no_path(script, tmp_path):
    configs = import_module("hintjax.experiments.config")
    own = Config(student="hintjax.models:resnet8", epochs=7, data_dir=str(tmp_path))
    configs.save(own, tmp_path)
    told = script("edge_table")._told(Config(teacher=str(tmp_path)))
    assert told["teacher"] == "hintjax.models:resnet8" and told["teacher_epochs"] == 7
    assert str(tmp_path) not in str(told)
    assert script("edge_table")._told(Config())["teacher"] == Config().teacher


@pytest.mark.skipif(
    not (find_spec("tensorflow") and find_spec("ai_edge_litert")),
    reason="no converters; ./setup.sh --export installs them",
)
@pytest.mark.filterwarnings("ignore")  # TensorFlow warns of its own future
def test_the_edge_table_measures_the_files_of_a_comparison(script, tmp_path):
    edge_table = script("edge_table")
    run, file = tmp_path / "run", tmp_path / "results.json"
    config = Config(
        compare=("kd",),
        devices=1,
        limit=320,
        epochs=1,
        teacher_epochs=1,
        seeds=2,
        student="hintjax.models:plain_wide",
        teacher_at_least=0.0,
    )
    distill(config, claim(run, config))
    options = ["--rounds", "6", "--steps", "1", "--out", str(file)]
    record = edge_table.main([str(run), *options])
    (data,) = json.loads(file.read_text())["data"]
    assert data["images"] == 359 and "data_dir" not in data["config"]
    found = {(row["arm"], row["file"]): row for row in data["rows"]}
    assert list(found) == [
        (arm, form)
        for arm in ("teacher", "kd")
        for form in ("float", "stablehlo", "int8")
    ]
    for (arm, form), row in found.items():
        assert row["parameters"] == 112714
        if form == "stablehlo":
            assert row["over_teacher"] is row["step_seconds"] is None
        else:
            assert positive(row["over_teacher"])
        assert len(row["accuracy"]) == (1 if arm == "teacher" else 2)
        assert min(row["agreement"]) > (0.5 if form == "int8" else 0.99)
        assert (row["arena"] is None) == (form != "int8" or not MICRO)
    accuracy = [
        json.loads((path / "result.json").read_text())["test/accuracy"]
        for path in sorted((run / "kd").iterdir())
    ]
    assert found["kd", "float"]["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert found["kd", "int8"]["bytes"] < found["kd", "float"]["bytes"]
    assert len(edge_table.markdown(record).splitlines()) == 2 + len(found)


def test_interval_is_that_of_order_statistics(script):
    # Tables of the sign test: the 10th and the 21st of 30, the extremes of 6.
    measure = script("measure")
    assert measure.summary(range(1, 31)) == {"median": 15.5, "low": 10, "high": 21}
    assert measure.summary(range(1, 7)) == {"median": 3.5, "low": 1, "high": 6}
    # Five values have no such interval; then times decide nothing.
    assert measure.summary(range(5)) == {"median": 2, "low": 0, "high": 4}
    assert measure.FEWEST_ROUNDS == 6


def test_ratios_are_paired_within_a_round(script):
    # The machine becomes four times slower, but every round has the same ratio.
    seconds = {"whole": [3.0] * 3 + [12.0] * 3, "part": [2.0] * 3 + [8.0] * 3}
    ratio = script("measure").paired(seconds, "whole", ["part"])
    assert ratio == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_flops_decide_where_the_interval_contains_the_bar(script):
    verdict = script("measure").verdict
    narrow, wide, slow = (
        {"low": low, "high": high} for low, high in [(1.0, 1.04), (1.0, 1.2), (1.1, 2)]
    )
    assert verdict(1.05, narrow, 1.2, rounds=6) == "within"
    assert verdict(1.05, slow, 1.0, rounds=6) == "above"
    assert verdict(1.05, wide, 1.01, rounds=6) == "within by FLOPs"
    assert verdict(1.05, wide, 1.06, rounds=6) == "above by FLOPs"
    assert verdict(1.05, wide, None, rounds=6) == "undecided"
    assert verdict(1.05, narrow, 1.2, rounds=5) == "above by FLOPs"


def test_steps_that_diverge_are_not_measured(script):
    runs = {"step": lambda: jax.numpy.float32("nan")}
    with pytest.raises(FloatingPointError, match="step: expected finite"):
        script("measure").interleave(runs, rounds=6, steps=1)


def test_every_second_of_a_killed_process_has_its_part(script, tmp_path):
    goodput = script("reliability_goodput")
    log = tmp_path / "log"
    log.write_text(
        "imported 12.0\n"
        "span compilation 13.0 15.0\n"
        "span compilation 12.5 16.0\n"  # contains the span before
        "span restore 15.0 17.0\n"
        "first 18.0\n"
        "span data 18.0 18.5\n"
        "step 10 24.0\n"
        "span latest 24.0 24.25\n"
        "span save 24.25 24.5\n"
        "span writing 24.5 26.5\n"  # on another thread
        "span evaluation 27.0 28.0\n"
        "step 20 30.0\n"
        "span save 30.0 30.25\n"
        "step 3"  # cut by the kill
    )
    told = goodput.read(log)
    seconds = goodput.parts(told, newest=10, began=10.0, ended=31.0)
    assert seconds == {
        "start": 2.0,
        "compilation": 3.5,
        "restore": 1.0,
        "preparation": 1.5,
        "data wait": 0.5,
        "steps": 5.5,
        "lost": 7.0,  # all since step 10: its checkpoint is the newest
        "checkpoint": 0.0,
        "evaluation": 0.0,
    }
    assert goodput.share(seconds) == 5.5 / 15.5
    kept = goodput.parts(told, newest=20, began=10.0, ended=31.0)
    assert (kept["lost"], kept["checkpoint"], kept["evaluation"]) == (1.0, 0.5, 1.0)
    assert kept["steps"] == 10.0 and sum(kept.values()) == 21.0
    assert goodput.stalls(told) == [0.5, 0.25]


def test_the_page_of_reliability_promises_what_is_tested(script):
    """Every test that the page names exists, and every promise has a test."""
    page = script("reliability_page")
    campaigns = script("reliability").CAMPAIGNS
    for promise in page.PROMISES:
        assert promise.tests
        assert promise.campaign in (None, *campaigns)
        for named in promise.tests:
            file, _, test = named.partition("::")
            tree = ast.parse((FOLDER.parent / file).read_text(encoding="utf-8"))
            tests = {node.name for node in tree.body if hasattr(node, "name")}
            assert test in tests, named


def test_the_page_of_reliability_says_what_was_found(script):
    page = script("reliability_page")
    file = FOLDER / "results" / "reliability.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert text == page.page(record)
    # A campaign that failed or was not tried promises nothing.
    promised, _, _ = text.partition("## Not promised")
    assert promised.count("campaign *SIGKILL*") == 1
    kills = record["SIGKILL"] | {"committed steps lost": 1}
    untried = {"machine": record["SIGKILL"]["machine"], "tried": False}
    promised, _, others = page.page({"full disk": untried}).partition("## Not prom")
    assert "full disk ends" not in promised and "no file system to fill" in others
    for changed in ({**record, "SIGKILL": kills}, {}):
        promised, _, others = page.page(changed).partition("## Not promised")
        assert "campaign *SIGKILL*" not in promised and "is killed at any" in others
    assert promised.count("| `tests/") == sum(
        promise.campaign is None for promise in page.PROMISES
    )


def test_a_worker_times_the_programs_that_it_is_asked_for(script, tmp_path):
    served = "import sys; sys.path.insert(0, sys.argv[1]); import worker\n"
    served += "print('not an answer', file=sys.stderr)\n"
    served += "worker.serve({'a': lambda n: 2.0 * n, 'b': lambda n: n}, {'here': 1})"
    other = script("worker").Worker([sys.executable, "-c", served, str(FOLDER)])
    assert (other.programs, other.about) == (["a", "b"], {"here": 1})
    assert [other.seconds("a", 3), other.seconds("b", 1)] == [6.0, 1]
    other.close()
    with pytest.raises(RuntimeError, match="exit code 3"):
        script("worker").Worker([sys.executable, "-c", "raise SystemExit(3)"])


def test_steps_are_compared_with_the_faster_layout_of_torch(script):
    against = script("against_torch")
    over = against.ratios(
        {
            "torch: kd, channels last": [1.0] * 6,
            "torch: kd, default layout": [2.0] * 6,
            "hintjax on 1 device: kd": [0.9] * 6,
            "hintjax on 1 device: kd cached": [0.7] * 6,
        }
    )
    live, cached = over.values()
    assert live["time"]["median"] == 0.9 and live["verdict"] == "within"
    assert cached["time"]["median"] == 0.7 and cached["verdict"] == "above"


def test_the_steps_against_torch_run(script):
    against = script("against_torch")
    options = ["--small", "--worker", "1", "--methods", "kd", "--batch", "8"]
    steps = against._steps(against._options([*options, "--size", "8"]))
    assert set(steps) == {"kd", "kd cached"}
    losses = [
        float(function(state, *rest)[1]["loss"])
        for function, state, rest in steps.values()
    ]
    assert np.isfinite(losses).all() and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_single_convolutions_are_compared_with_the_faster_layout_of_torch(script):
    convolutions = script("convolutions")
    programs = convolutions._programs(2, *convolutions.SMALL["8x8, 4 to 4"])
    assert {name: run().shape for name, run in programs.items()} == {
        "forward": (2, 8, 8, 4),
        "input gradient": (2, 8, 8, 4),
        "kernel gradient": (3, 3, 4, 4),
    }
    seconds = {}
    for part in programs:
        seconds["XLA", f"8x8, 4 to 4, {part}"] = [3.0] * 6
        for layout, time in (("channels last", 4.0), ("default layout", 2.0)):
            seconds["torch", f"8x8, 4 to 4, {part}, {layout}"] = [time] * 6
    found = convolutions._compared(2, convolutions.SMALL, seconds)
    assert len(found) == 3
    for row in found.values():
        assert row["over_torch"]["XLA"]["median"] == 1.5
        assert row["operations"] == 2 * 9 * 4 * 4 * 2 * 64


@pytest.mark.quick
def test_the_page_shows_the_ratios_of_the_convolutions():
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    record = json.loads((results / "convolutions_cpu.json").read_text())
    for part in ("forward", "input gradient", "kernel gradient"):
        rows = [
            row["over_torch"]
            for name, row in record["convolutions"].items()
            if name.endswith(part)
        ]
        ranges = []
        for who in ("XLA", "XLA without YNNPACK"):
            ratios = [row[who]["median"] for row in rows]
            ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        row = f"| {part} | {ranges[0]} | {ranges[1]} |"
        assert row in (results / "README.md").read_text()


@pytest.mark.long
def test_a_batch_on_all_devices_is_measured_against_one(script):
    record = script("cpu_devices").main(["--small", "--rounds", "1", "--steps", "1"])
    (row,) = record["rows"].values()
    assert row["all_over_one"]["median"] > 0 and row["flops_per_device"] > 0
