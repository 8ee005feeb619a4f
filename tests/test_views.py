"""Views: tokens as maps, in both directions and both stages; heads as outputs."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import losses, models, regressors
from hintjax.method import Context, reduced
from hintjax.networks import Features

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
GRID = partial(regressors.to_grid, drop=1)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def values(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=shape), jnp.float32)


TOKENS, MAP = values(3, 17, 8), values(3, 4, 4, 12, seed=1)
STUDENT = Features(hints={"block2": TOKENS, "token": TOKENS[:, 0]})
TEACHER = Features(hints={"group2": MAP, "pool": MAP.mean((1, 2))})


@pytest.mark.quick
def test_a_method_sees_its_hints_through_the_views_and_nothing_else_changes():
    grid = np.asarray(TOKENS)[:, 1:].reshape(3, 4, 4, 8)
    method = hj.attention_transfer([("block2", "group2")])
    seen = hj.viewed(method, student=GRID)
    got, _, _ = seen.apply({}, {}, STUDENT, TEACHER, {}, CONTEXT)
    maps = Features(hints={"block2": jnp.asarray(grid)})
    want, _, _ = method.apply({}, {}, maps, TEACHER, {}, CONTEXT)
    np.testing.assert_array_equal(got, want)
    assert (seen.student, seen.teacher) == (method.student, method.teacher)
    # The other direction; the vector that another term wants has no view.
    back = hj.viewed(hj.attention_transfer([("group2", "block2")]), teacher=GRID)
    terms = hj.objective(at=back, vector=hj.fitnets([("pool", "token")]))
    params, memory = terms.init(KEY, TEACHER, STUDENT, None)
    total, _, metrics = terms.apply(params, memory, TEACHER, STUDENT, {}, CONTEXT)
    np.testing.assert_allclose(metrics["at"], want.mean(), rtol=1e-6)
    assert total.shape == (3,)


@pytest.mark.quick
@pytest.mark.parametrize("turned", [False, True])
def test_a_view_keeps_the_reduction_of_its_method(turned):
    pair = ("block2", "group2")
    views, shown = {"student": GRID}, (STUDENT, TEACHER)
    if turned:  # the teacher has the tokens
        pair, views, shown = pair[::-1], {"teacher": GRID}, (TEACHER, STUDENT)
    method = hj.viewed(hj.attention_transfer([pair]), **views)
    found = reduced(method, jax.eval_shape(lambda: shown[0]))
    small = found.reduce(shown[1])
    assert [hint.size for hint in small.hints.values()] == [3 * 4 * 4]
    got, want = (
        each.apply({}, {}, shown[0], taught, {}, CONTEXT)[0]
        for each, taught in ((found.method, small), (method, shown[1]))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.quick
def test_shapes_are_seen_too_and_so_are_stages_that_come_before():
    method = hj.viewed(hj.factor_transfer([("group2", "block2")]), teacher=GRID)
    student, teacher = jax.eval_shape(lambda: (TEACHER, STUDENT))
    paraphraser, _ = method.prepare.init(KEY, student, teacher, None)
    shapes = [leaf.shape for leaf in jax.tree.leaves(paraphraser)]
    assert (3, 3, 8, 8) in shapes
    prepared, _ = method.init(KEY, student, teacher, None)
    assert (3, 3, 12, 12) in [leaf.shape for leaf in jax.tree.leaves(prepared)]


@pytest.mark.quick
def test_what_is_deployed_sees_its_hints_through_the_views():
    """A transformer with SimKD's projector and a convolutional teacher's classifier."""
    teacher = TEACHER._replace(params={"classifier": {"kernel": values(12, 5)}})
    simkd = hj.simkd(("block2", "group2"))
    method = hj.viewed(simkd, student=GRID)
    params, memory = method.init(KEY, STUDENT, teacher, None)
    got = method.deploy(params, memory, STUDENT, teacher)
    maps = Features(hints={"block2": GRID(TOKENS)})
    want = simkd.deploy(params, memory, maps, teacher)
    assert got.shape == (3, 5)
    np.testing.assert_array_equal(got, want)


@pytest.mark.quick
def test_tokens_that_form_no_grid_are_refused_when_a_stage_is_initialized():
    method = hj.viewed(hj.fitnets([("block2", "group2")]), student=regressors.to_grid)
    student, teacher = jax.eval_shape(lambda: (STUDENT, TEACHER))
    with pytest.raises(
        ValueError, match="got 17 tokens with drop=0. drop=1 leaves 4x4"
    ):
        method.init(KEY, student, teacher, None)


@pytest.mark.quick
def test_a_head_stands_for_the_output():
    """DeiT's objective: labels for the class token, the teacher for the other token."""
    heads = {
        "classifier": values(4, 5),
        "distillation_classifier": values(4, 5, seed=1),
    }
    student, teacher = Features(hints=heads), Features(output=values(4, 5, seed=2))
    labels = jnp.arange(4)
    terms = hj.objective(
        task=hj.weighted(hj.at_head(hj.task(cross_entropy), student="classifier"), 0.5),
        kd=hj.weighted(hj.at_head(hj.kd(3.0), student="distillation_classifier"), 0.5),
    )
    assert terms.student == hj.Wants(False, tuple(heads))
    assert terms.teacher == hj.Wants(True)
    params, memory = terms.init(KEY, student, teacher, None)
    got, _, metrics = terms.apply(
        params, memory, student, teacher, {"label": labels}, CONTEXT
    )
    task = cross_entropy(heads["classifier"], labels)
    kd = losses.kd_loss(
        heads["distillation_classifier"], teacher.output, temperature=3.0
    )
    np.testing.assert_allclose(got, (task + kd) / 2, rtol=1e-6)
    assert "task/accuracy" in metrics
    swapped = hj.at_head(hj.kd(3.0), teacher="classifier")
    got, _, _ = swapped.apply({}, {}, teacher, student, {}, CONTEXT)
    want = losses.kd_loss(teacher.output, heads["classifier"], temperature=3.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.quick
def test_a_method_that_reads_no_output_has_no_head():
    message = "at_head: expected a method that reads the student's output, got a"
    with pytest.raises(ValueError, match=message):
        hj.at_head(hj.fitnets([("a", "b")]), student="classifier")
    with pytest.raises(ValueError, match="reads the teacher's output"):
        hj.at_head(hj.task(cross_entropy), teacher="classifier")


# In their stages, between a convolutional network and a transformer

BATCH = {"image": values(8, 8, 8, 1, seed=3), "label": jnp.arange(8) % 3}


def networks():
    vit = models.VisionTransformer(2, 8, 2, 2, 3, distillation=True)
    cnn = models.PlainCNN((8, 12), 3, pools=(1,))
    return hj.linen(vit), hj.linen(cnn)


def trained(stage, student, teacher, updates):
    ours = jax.jit(student.init)(jax.random.key(0), BATCH["image"])
    theirs = jax.jit(teacher.init)(jax.random.key(1), BATCH["image"])
    state = stage.init(KEY, ours, theirs, BATCH)
    before = jax.tree.map(jnp.copy, state.params["student"])
    state, first = stage.update(state, theirs, BATCH)
    for _ in range(updates):
        state, last = stage.update(state, theirs, BATCH)
    chex.assert_tree_all_finite((state.params, last))
    same = jax.tree.map(np.array_equal, before, state.params["student"])
    unmoved = {name for name, tree in same.items() if all(jax.tree.leaves(tree))}
    return first, last, unmoved


def test_a_transformer_takes_hints_from_a_convolutional_network():
    vit, cnn = networks()
    grid = partial(regressors.to_grid, drop=2)
    pairs = [("block1", "conv2")]
    hint = hj.objective(
        hint=hj.viewed(hj.fitnets(pairs), student=grid),
        at=hj.viewed(hj.attention_transfer(pairs), student=grid),
    )
    stage = hj.hint_stage(vit, cnn, hint, optax.adam(1e-2))
    first, last, unmoved = trained(stage, vit, cnn, updates=30)
    assert last["hint"] < 0.5 * first["hint"]
    assert last["at"] < first["at"]
    # What comes after block1 does not feed the hint.
    assert {"block2", "norm", "classifier", "distillation_classifier"} == unmoved


def test_a_convolutional_network_takes_hints_from_a_transformer():
    vit, cnn = networks()
    grid = partial(regressors.to_grid, drop=2)
    hint = hj.fitnets([("conv2", "block1")], regressor=regressors.resampled)
    terms = hj.objective(
        task=hj.task(cross_entropy),
        kd=hj.at_head(hj.kd(), teacher="distillation_classifier"),
        hint=hj.viewed(hint, teacher=grid),
    )
    stage = hj.distillation_stage(cnn, vit, terms, optax.adam(1e-2))
    first, last, unmoved = trained(stage, cnn, vit, updates=30)
    assert last["hint"] < 0.9 * first["hint"]
    assert last["task"] < first["task"]
    assert not unmoved
