"""Optimizers that need more than the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import hintjax as hj
from hintjax.networks import linen
from hintjax.stages import optimizer as optimizers

KEY = jax.random.key(0)
BATCH = {
    "image": np.linspace(-1, 1, 4 * 8 * 8).reshape(4, 8, 8, 1).astype(np.float32),
    "label": np.arange(4, dtype=np.int32) % 3,
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.tanh(nn.Dense(5, name="first")(x[:, 0].reshape(len(x), -1)))
        x = nn.tanh(nn.Dense(4, name="second")(x))
        return nn.Dense(3, name="head")(x)


NETWORK = linen(Net())
VARIABLES = jax.jit(NETWORK.init)(KEY, BATCH["image"])
TEACHER = jax.jit(NETWORK.init)(jax.random.key(1), BATCH["image"])
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


def distill(optimizer, **how):
    method = hj.objective(task=hj.task(CROSS_ENTROPY), kd=hj.kd())
    return hj.distillation_stage(NETWORK, NETWORK, method, optimizer, **how)


def hint(optimizer, **how):
    method = hj.fitnets([("first", "first")])
    return hj.hint_stage(NETWORK, NETWORK, method, optimizer, **how)


EVERYTHING = {
    "rates": {"first": 0.5},
    "accumulate": 2,
    "mesh": hj.make_mesh(fsdp=2, devices=jax.devices()[:2]),
}


def losses(stage, steps):
    state, found = stage.init(KEY, VARIABLES, TEACHER, BATCH), []
    for _ in range(steps):
        state, metrics = stage.update(state, TEACHER, BATCH)
        found.append(float(metrics["loss"]))
    return state, found


@pytest.mark.parametrize("make", [distill, hint])
def test_the_rate_falls_on_a_plateau(make):
    """No loss is as much lower as `rtol` wants it, so every second step counts."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.9)
    how = EVERYTHING if make is distill else {}
    state, found = losses(make(optax.chain(optax.sgd(0.1), plateau), **how), 5)
    assert float(optax.tree.get(state.opt_state, "scale")) < 1
    assert float(optax.tree.get(state.opt_state, "best_value")) == found[0]


@pytest.mark.parametrize("make", [distill, hint])
def test_a_line_search_gets_the_loss_as_a_function(make):
    """It lowers the loss in each step, and the loss that it saw is that of the next."""
    search = optax.scale_by_backtracking_linesearch(20, store_grad=False)
    optimizer = optax.chain(optax.sgd(1.0), search)
    stage = make(optimizer, **({"accumulate": 2} if make is distill else {}))
    state, found, foreseen = stage.init(KEY, VARIABLES, TEACHER, BATCH), [], []
    for _ in range(2):
        state, metrics = stage.update(state, TEACHER, BATCH)
        found.append(float(metrics["loss"]))
        foreseen.append(float(optax.tree.get(state.opt_state, "value")))
    assert found[1] < found[0]
    np.testing.assert_allclose(foreseen[0], found[1], 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("make", [distill, hint])
def test_two_trees_of_parameters_are_refused(make):
    lookahead = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    for optimizer in (lookahead, optax.chain(optax.clip(1.0), lookahead)):
        with pytest.raises(hj.Refusal, match=r"stage: .* got optax.lookahead, which"):
            jax.eval_shape(make(optimizer).init, KEY, VARIABLES, TEACHER, BATCH)


@pytest.mark.quick
def test_an_argument_that_no_stage_has_is_named():
    def update(updates, state, params=None, *, curvature, **others):
        return updates, state

    asking = optax.GradientTransformationExtraArgs(lambda params: (), update)
    stage = distill(asking)
    state = jax.eval_shape(stage.init, KEY, VARIABLES, TEACHER, BATCH)
    wanted = r"needs at most value, grad, value_fn beside gradients, .* 'curvature'"
    with pytest.raises(hj.Refusal, match=wanted):
        jax.eval_shape(stage.update, state, TEACHER, BATCH)


@pytest.mark.quick
@pytest.mark.parametrize("make", [distill, hint])
def test_a_gradient_that_would_be_added_is_refused(make):
    """It is not an update: it climbs the loss. A mask of optax leaves it as it is."""
    mask = {"student": False, "regressors": True}
    for optimizer in (optax.identity(), optax.masked(optax.adam(0.1), mask)):
        stage = make(optimizer)
        state = jax.eval_shape(stage.init, KEY, VARIABLES, TEACHER, BATCH)
        with pytest.raises(hj.Refusal, match="got the gradient of '.*climbs"):
            jax.eval_shape(stage.update, state, TEACHER, BATCH)
    labels = {"student": "frozen", "regressors": "trained"}
    fine = {"frozen": optax.set_to_zero(), "trained": optax.adam(0.1)}
    stage = make(optax.partition(fine, labels))
    state = jax.eval_shape(stage.init, KEY, VARIABLES, TEACHER, BATCH)
    jax.eval_shape(stage.update, state, TEACHER, BATCH)


@pytest.mark.quick
def test_an_optimizer_that_takes_no_extra_argument_gets_none():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    stage = distill(optax.contrib.sam(optax.sgd(0.1), adversary))
    state = jax.eval_shape(stage.init, KEY, VARIABLES, TEACHER, BATCH)
    jax.eval_shape(stage.update, state, TEACHER, BATCH)


@pytest.mark.quick
def test_a_state_of_another_optimizer_is_refused():
    stage, other = distill(optax.sgd(0.1)), distill(optax.adam(0.1))
    state = jax.eval_shape(stage.init, KEY, VARIABLES, TEACHER, BATCH)
    with pytest.raises(hj.Refusal, match="the state of this stage's optimizer, got th"):
        jax.eval_shape(other.update, state, TEACHER, BATCH)


@pytest.mark.quick
def test_optax_multi_steps_is_one_step_from_an_optimizer(unchecked):
    with pytest.raises(hj.Refusal, match=r"MultiSteps is one after \.gradient_transf"):
        distill(optax.MultiSteps(optax.sgd(0.1), 4))


@pytest.mark.quick
def test_an_ordinary_optimizer_computes_what_it_did():
    """Arguments that nobody reads leave no trace in the program."""
    params = {"w": jnp.ones(3)}
    adam = optax.adamw(1e-3)
    state = adam.init(params)

    def plain(grads, state, params, value):
        return adam.update(grads, state, params)

    def ours(grads, state, params, value):
        nobody = [lambda _: 1 / 0] * 2
        return optimizers.updates(adam, grads, state, params, value, *nobody)

    given = params, state, params, jnp.ones(())
    assert str(jax.make_jaxpr(plain)(*given)) == str(jax.make_jaxpr(ours)(*given))


@pytest.mark.parametrize("make", [distill, hint])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.masked(optax.adam(0.1), {"first": True, "second": True, "head": False}),
        optax.multi_transform({"a": optax.adam(0.1)}, lambda params: "b"),
    ],
    ids=["mask", "labels"],
)
def test_an_optimizer_of_the_students_tree_alone_is_refused(make, optimizer):
    """LoRA's masks are often trees of the student, and a stage has regressors too."""
    words = r"\['regressors', 'student'\], got a ValueError .*as functions of the param"
    with pytest.raises(hj.Refusal, match=words):
        make(optimizer).init(KEY, VARIABLES, TEACHER, BATCH)
