"""Which terms teach the student: what cannot is refused before the first step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax.methods import (
    attention_transfer,
    factor_transfer,
    flows,
    fsp,
    review,
    similarity_preserving,
)
from hintjax.networks import linen
from hintjax.stages.dependency import differentiated

KEY = jax.random.key(0)
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
BATCH = {
    "image": np.ones((4, 8, 8, 3), np.float32),
    "label": np.arange(4, dtype=np.int32),
    "index": np.arange(4, dtype=np.int32),
}
GOOD = ("block1", "block1")


def nothing(x):
    return x


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def ruled(gradient):
    """A function whose gradient is another one."""
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (gradient(x, g),))
    return rule


@jax.custom_jvp
def still(x):
    return jnp.sin(x)


still.defjvp(lambda x, t: (jnp.sin(x[0]), jnp.zeros_like(t[0])))

no_gradient = ruled(lambda x, g: jnp.zeros_like(g))


BLOCKING = {
    "stop_gradient": jax.lax.stop_gradient,
    "round": jnp.round,
    "integers": lambda x: x.astype(jnp.int32).astype(x.dtype),
    "sign": jnp.sign,
    "jit": jax.jit(jax.lax.stop_gradient),
    "remat": jax.checkpoint(lambda x: jax.lax.stop_gradient(jnp.sin(x))),
    "scan": lambda x: jax.lax.scan(lambda c, _: (c, jnp.floor(c)), x, None, 2)[1][0],
    "cond": lambda x: jax.lax.cond(x.sum() > 0, jnp.round, jnp.floor, x),
    "custom_jvp": still,
    "custom_vjp": no_gradient,
    "custom_vjp in a scan": lambda x: jax.lax.scan(
        lambda c, _: (c + 1, jax.jit(no_gradient)(c)), x, None, 2
    )[1][0],
    "custom_vjp in a remat": jax.checkpoint(lambda x: no_gradient(jnp.sin(x))),
    "custom_vjp of a constant": ruled(lambda x, g: x),
}


class Same(nn.Module):
    function: object

    @nn.compact
    def __call__(self, x):
        return self.function(x)


class Net(nn.Module):
    """Two convolutions, a layer that applies a function, and a head."""

    function: object = nothing

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Conv(4, (3, 3), name="block1")(x))
        y = Same(self.function, name="same")(x)
        y = nn.relu(nn.Conv(4, (3, 3), name="block2")(y))
        return nn.Dense(4, name="head")(y.mean((1, 2)))


def start(method, function=nothing, make=hj.distillation_stage):
    """The shapes of a stage's first state; nothing is compiled."""
    student, teacher = linen(Net(function)), linen(Net())
    shapes = jax.eval_shape(teacher.init, KEY, BATCH["image"])
    stage = make(student, teacher, method, optax.adam(0.1))
    carry = None
    if method.prepare is not None:
        before = hj.hint_stage(student, teacher, method.prepare, optax.sgd(0.1))
        carry = jax.eval_shape(before.init, KEY, shapes, shapes, BATCH)
    return jax.eval_shape(stage.init, KEY, shapes, shapes, BATCH, None, carry)


def task(weight=0.1):
    return hj.weighted(hj.task(CROSS_ENTROPY), weight)


@pytest.mark.parametrize("function", BLOCKING.values(), ids=BLOCKING)
def test_a_layer_without_gradient_is_refused(function):
    method = hj.objective(task=task(), hint=hj.fitnets([("same", "block2")]))
    wanted = (
        r"stage: expected the term 'hint' to have a gradient for the student's "
        r"parameters, got none through layer 'same'\. Choose a layer "
    )
    with pytest.raises(hj.Refusal, match=wanted):
        start(method, function)
    with pytest.raises(hj.Refusal, match="the method to have a gradient"):
        start(hj.fitnets([("same", "block2")]), function, hj.hint_stage)


@pytest.mark.parametrize("make", [hj.hint_stage, hj.distillation_stage])
def test_the_input_of_the_first_layer_is_refused(make):
    with pytest.raises(hj.Refusal, match="got none through layer 'block1:in'"):
        start(hj.fitnets([("block1:in", "block1:in")]), make=make)


PASSING = {
    "straight through": straight_through,
    "reversed": ruled(lambda x, g: -g),
    "clipped": ruled(lambda x, g: jnp.clip(g, -1, 1) * x),
    "scan": lambda x: jax.lax.scan(lambda c, _: (straight_through(c), c), x, None, 2)[
        0
    ],
    "jit": jax.jit(straight_through),
    "remat": jax.checkpoint(lambda x: straight_through(jnp.sin(x))),
}


@pytest.mark.parametrize("function", PASSING.values(), ids=PASSING)
def test_a_rule_that_passes_the_gradient_on_teaches(function):
    start(hj.fitnets([("same", "block2")]), function)


def test_the_rule_of_a_custom_vjp_says_which_argument_changes_which_result():
    @jax.custom_vjp
    def rule(x, y, n):
        return x + y * n, y

    rule.defvjp(
        lambda x, y, n: (rule(x, y, n), (x, y)),
        lambda kept, g: (g[0] * kept[1], jnp.ones_like(g[1]) * kept[0], None),
    )
    shape = jax.ShapeDtypeStruct((3,), "float32")
    moving = {"x": shape, "y": shape}
    traced = differentiated(
        lambda moving, fixed: dict(enumerate(rule(moving["x"], moving["y"], fixed))),
        moving,
        jax.ShapeDtypeStruct((), "int32"),
    )
    first, second = (
        traced.changes(lambda path, number=number: path[0].key == number)
        for number in range(2)
    )
    assert first.changes == {"x": True, "y": False}
    assert first.moving == {"x": False, "y": True}
    assert second.changes == second.moving == {"x": False, "y": False}
    assert not first.fixed and not second.fixed


def test_the_loss_itself_may_stop_the_gradient():
    def stopped(student, teacher, **how):
        difference = jax.lax.stop_gradient(student) - teacher
        return jnp.square(difference).mean(range(1, difference.ndim))

    with pytest.raises(hj.Refusal, match="got none through layer 'block1'"):
        start(hj.fitnets([GOOD], loss=stopped))

    def right(output, label):
        return 1.0 - (output.argmax(-1) == label)

    method = hj.objective(hint=hj.fitnets([GOOD]), accuracy=hj.task(right))
    wanted = "the term 'accuracy' to have a gradient.*, got none through the output"
    with pytest.raises(hj.Refusal, match=wanted):
        start(method)


def test_a_loss_that_reads_nothing_is_refused():
    constant = hj.task(lambda output, label: jnp.zeros(len(label)))
    with pytest.raises(hj.Refusal, match="for the student's parameters, got none. "):
        start(constant)


@pytest.mark.parametrize("name", ["block1:in", "same"])
@pytest.mark.parametrize(
    "method", [hj.fitnets, similarity_preserving, attention_transfer]
)
def test_every_guided_layer_of_a_term_teaches(method, name):
    function = jax.lax.stop_gradient
    wanted = (
        rf"the method to teach the student through every guided layer, got no "
        rf"gradient through layer '{name}'\."
    )
    start(method([GOOD, ("block2", "block2")]), function)
    with pytest.raises(hj.Refusal, match=wanted):
        start(method([GOOD, (name, "block2")]), function)


def test_a_layer_that_the_gradient_of_others_reads_has_its_part():
    """A flow from the image on, and a fusion with deeper layers."""
    flow = flows([("block1:in", "block1:in"), GOOD])
    start(fsp(flow))
    start(review([("block1:in", "block1"), ("block2", "block2")]))
    # The deep layer stands for the teacher here: its value is the target.
    start(hj.self_taught(hj.fitnets([("block1", "block2")])))


def test_every_flow_of_a_term_teaches():
    """Flows are stacked: each is looked at on its own."""
    dead = (("same", "same"), ("block1", "block2"))
    good = flows([GOOD, ("block2", "block2")])
    start(fsp([*good, *flows([("block1:in", "block1:in"), GOOD])]))
    with pytest.raises(hj.Refusal, match="got no gradient through layer 'same'"):
        start(fsp([*good, dead]), jax.lax.stop_gradient)


def test_terms_inside_of_terms_are_named():
    good, bad = hj.fitnets([GOOD]), hj.fitnets([("block1:in", "block2")])
    inner = hj.objective(good=good, bad=bad)
    with pytest.raises(hj.Refusal, match="the term 'both/bad' to have a gradient"):
        start(hj.objective(task=task(), both=hj.weighted(inner, 0.5)))
    watched = hj.objective(good=good, bad=hj.weighted(bad, 0))
    start(hj.objective(task=task(), both=hj.weighted(watched, 0.5)))
    start(hj.objective(task=task(), both=hj.weighted(inner, 0)))


def test_a_term_of_weight_zero_only_watches():
    watched = hj.fitnets([("block1:in", "block2")])
    start(hj.objective(task=task(), hint=hj.weighted(watched, 0)))
    start(hj.objective(task=task(), hint=hj.weighted(watched, 0.0)))
    # A weight in the state may become another.
    with pytest.raises(hj.Refusal, match="the term 'hint'"):
        start(hj.objective(task=task(), hint=hj.weighted(watched, hj.Adjustable(0.0))))
    with pytest.raises(hj.Refusal, match="the term 'hint'"):
        schedule = optax.constant_schedule(0.0)
        start(hj.objective(task=task(), hint=hj.weighted(watched, schedule)))


def test_a_stage_that_trains_the_teachers_side_alone_is_no_error():
    start(hj.objective(task=task(), factor=factor_transfer([GOOD])))


@pytest.mark.parametrize("function", [nothing, *BLOCKING.values()])
def test_a_hint_stage_freezes_what_no_gradient_reaches(function):
    """Otherwise weight decay would shrink layers that feed the hint by value alone."""
    state = start(hj.fitnets([("block2", "block2")]), function, hj.hint_stage)
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(state.opt_state), strict=True)
    trained = " ".join(map(jax.tree_util.keystr, paths))
    assert "block2" in trained and "head" not in trained
    assert ("block1" in trained) == (function is nothing)


def test_changes_pass_through_floats_alone():
    shape = jax.ShapeDtypeStruct((3,), "float32")
    given = {"x": shape, "n": jax.ShapeDtypeStruct((), "int32"), "y": shape}
    traced = differentiated(
        lambda moving, fixed: {
            "a": moving["x"] * moving["n"] * fixed,
            "n": moving["n"] + 1,
            "y": jnp.round(moving["y"]) + moving["x"],
        },
        given,
        shape,
    )

    def changed(name):
        return traced.changes(lambda path: path[0].key == name)

    assert changed("a").changes == {"x": True, "n": False, "y": False}
    assert changed("a").moving == {"x": False, "n": True, "y": False}
    assert changed("a").fixed
    assert changed("n").changes == dict.fromkeys(given, False)
    assert changed("y").changes == {"x": True, "n": False, "y": False}
    value = traced.values(lambda path: path[0].key == "y")
    assert value.moving == {"x": True, "n": False, "y": True} and not value.fixed
