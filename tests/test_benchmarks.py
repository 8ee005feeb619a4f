"""The benchmarks still run, and say what they mean; nothing here reads the clock."""

import json
import math
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """`script(name)` imports a benchmark as if it were run from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module


def positive(summary):
    values = [summary[key] for key in ("low", "median", "high")]
    return values == sorted(values) and values[0] > 0 and math.isfinite(values[-1])


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
    # What the compiler counts does not depend on the machine's load.
    assert record["ratios"]["hint_stage"]["flops"] <= step_time.BAR
    cut = record["ratios"]["hint_stage / cut networks"]["flops"]
    assert cut == pytest.approx(1, abs=0.02)
    assert record["ratios"]["hint_stage / fitnets"]["flops"] < 1

    step_time.main(["--plot", str(file)])
    assert file.with_suffix(".png").stat().st_size < 100_000


@pytest.mark.parametrize(
    "name",
    [
        "task_regressor",
        "teach_logits",
        "teach_maps",
        "kd",
        "attention_transfer",
    ],
)
def test_the_other_programs_of_step_time_trace(script, name):
    step_time = script("step_time")
    step, state, rest = step_time._steps(step_time._options(["--small"]))[name]()
    after, _ = jax.eval_shape(step, state, *rest)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_plain_flax_takes_the_same_step_as_the_task_stage(script):
    step_time = script("step_time")
    steps = step_time._steps(step_time._options(["--small"]))
    (plain, *ours), (task, *theirs) = steps["plain"](), steps["task"]()
    (_, stats, opt_state), _ = plain(ours[0], *ours[1])
    state, _ = task(theirs[0], *theirs[1])
    # The optimiser's trace holds the gradients, whatever the rate.
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


def test_interval_is_that_of_order_statistics(script):
    # Tables of the sign test: the 10th and the 21st of 30, the extremes of 6.
    measure = script("measure")
    assert measure.summary(range(1, 31)) == {"median": 15.5, "low": 10, "high": 21}
    assert measure.summary(range(1, 7)) == {"median": 3.5, "low": 1, "high": 6}
    # Five have no interval of that confidence; then nothing is decided by the clock.
    assert measure.summary(range(5)) == {"median": 2, "low": 0, "high": 4}
    assert measure.FEWEST_ROUNDS == 6


def test_ratios_are_paired_within_a_round(script):
    # The machine slows down fourfold; every round agrees on the ratio all the same.
    seconds = {"whole": [3.0] * 3 + [12.0] * 3, "part": [2.0] * 3 + [8.0] * 3}
    ratio = script("measure").paired(seconds, "whole", ["part"])
    assert ratio == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_flops_decide_where_the_interval_contains_the_bar(script):
    verdict = script("step_time")._verdict
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
