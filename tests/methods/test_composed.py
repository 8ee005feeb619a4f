"""Methods together in one objective, and in their stages, on real networks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.models import ResNet

KEY = jax.random.key(0)
STAGES = [(f"group{i}", f"group{i}") for i in (1, 2, 3)]
SUMS = [(f"group{i}/block1/sum", f"group{i}/block1/sum") for i in (1, 2, 3)]
NORMS = [f"group{i}/block1/norm2" for i in (1, 2, 3)]
LAST = STAGES[-1]

HINTS = {
    "fsp": hj.fsp(
        hj.flows([("stem", "stem"), *STAGES]), regressor=hj.regressors.linear
    ),
    "vid": hj.variational(STAGES),
    "nst": hj.selectivity(STAGES),
    "ab": hj.activation_boundary(SUMS),
    "ofd": hj.weighted(hj.overhaul(SUMS, NORMS), 1e-3),
    "ft": hj.factor_transfer([LAST]),
    "mgd": hj.weighted(hj.masked_generation([LAST]), 1e-3),
    "simkd": hj.simkd(LAST),
}
ABOVE = {
    "catkd": hj.class_attention(LAST),
    "kd": hj.kd(),
    "task": hj.task(optax.softmax_cross_entropy_with_integer_labels),
}


@pytest.fixture(scope="module")
def classroom():
    """Networks, their variables and a batch; the teacher is wider."""
    generator = np.random.default_rng(0)
    batch = {
        "image": jnp.array(generator.normal(size=(8, 8, 8, 3)), jnp.float32),
        "label": jnp.arange(8) % 5,
        "index": jnp.arange(8),
    }
    student, teacher = (
        hj.linen(ResNet(8, (3, 3, 4, 6), 5)),
        hj.linen(ResNet(8, (4, 4, 6, 8), 5)),
    )
    variables = [
        jax.jit(network.init)(jax.random.key(i), batch["image"])
        for i, network in enumerate((student, teacher))
    ]
    return student, teacher, *variables, batch


def trained(stage, classroom, steps, **carry):
    """The state after some steps, and the metrics of each."""
    _, _, ours, theirs, batch = classroom
    state = stage.init(KEY, ours, theirs, batch, **carry)
    metrics = []
    for _ in range(steps):
        state, one = stage.update(state, theirs, batch)
        metrics.append(jax.device_get(one))
    return state, metrics


@pytest.mark.long  # minutes of compilation
@pytest.mark.parametrize("kind", ["hint", "distillation"])
def test_all_methods_at_once_learn(classroom, kind):
    student, teacher, _, theirs, batch = classroom
    terms = HINTS if kind == "hint" else HINTS | ABOVE
    make = hj.hint_stage if kind == "hint" else hj.distillation_stage
    # The paraphraser of factor transfer stays as it was drawn: no stage comes before.
    method = hj.objective(**terms)._replace(prepare=None)
    stage = make(student, teacher, method, optax.adam(3e-3))
    state, metrics = trained(stage, classroom, 8)
    chex.assert_tree_all_finite((state.params, metrics))
    for name in terms:
        first, last = (
            np.mean([one[name] for one in part]) for part in (metrics[:2], metrics[-2:])
        )
        assert last < first, name
    chex.assert_tree_all_finite(stage.evaluate(state, theirs, batch))


def test_factors_are_carried_from_the_paraphraser(classroom):
    student, teacher, ours, *_ = classroom
    first = hj.hint_stage(
        student, teacher, hj.objective(ft=hj.paraphrase([LAST])), optax.adam(1e-2)
    )
    state, metrics = trained(first, classroom, 5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    chex.assert_trees_all_equal(*jax.device_get((state.params["student"], ours.params)))
    learned = jax.device_get(state.params["regressors"]["ft"])
    second = hj.distillation_stage(
        student,
        teacher,
        hj.objective(ft=hj.factor_transfer([LAST]), task=ABOVE["task"]),
        optax.adam(1e-2),
    )
    state, _ = trained(second, classroom, 3, carry=state)
    state = jax.device_get(state._replace(key=None))
    chex.assert_trees_all_equal(state.memory["ft"]["prepared"], learned)
    chex.assert_tree_all_finite(state.params["regressors"]["ft"])
