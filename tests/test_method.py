"""Methods compose: weighted sums, schedules, names, keys, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import hintjax as hj
from hintjax.method import Context, Method, over_pairs, union
from hintjax.methods.task import task
from hintjax.networks import Features, Wants
from hintjax.objective import Adjustable, Weighted, objective, weighted

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("strict")]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(0)
NOTHING = Features()


def context(step=0, train=True, key=KEY):
    return Context(key, jnp.int32(step), train)


def constant(*values, wants=None, **metrics):
    """A method with these values that counts how often it was applied."""

    def init(key, student, teacher, data):
        return {"at": jax.random.key_data(key)}, {"calls": 0}

    def apply(params, memory, student, teacher, batch, context):
        return jnp.array(values), {"calls": memory["calls"] + 1}, metrics

    return Method(wants or Wants(), Wants(), init, apply)


def seen():
    """A method that reports its own context."""

    def apply(params, memory, student, teacher, batch, context):
        metrics = {
            "draw": jax.random.uniform(context.key),
            "step": context.step,
            "train": context.train,
        }
        return jnp.zeros(1), memory, metrics

    return Method(Wants(), Wants(), lambda *_: ({}, {}), apply)


def applied(method, batch=None, at=None, **features):
    params, memory = method.init(KEY, NOTHING, NOTHING, None)
    shown = Features(**features)
    return method.apply(params, memory, shown, NOTHING, batch or {}, at or context())


# Objectives


def test_an_objective_is_the_weighted_sum_of_its_terms():
    method = objective(
        one=weighted(constant(1.0, 2.0), 0.5),
        two=weighted(constant(10.0, 20.0), 3.0),
        off=weighted(constant(7.0, 7.0), 0.0),
        bare=constant(100.0, 200.0),
    )
    values, _, metrics = applied(method)
    np.testing.assert_allclose(values, [130.5, 261.0])
    assert {name: float(value) for name, value in metrics.items()} == {
        "one": 1.5,
        "one/weighted": 0.75,
        "two": 15,
        "two/weighted": 45,
        "off": 7,
        "off/weighted": 0,
        "bare": 150,
        "bare/weighted": 150,
        "loss": 195.75,
    }


def test_a_weight_may_be_a_schedule_of_the_step():
    schedule = optax.linear_schedule(8.0, 0.0, 4)
    method = objective(
        hint=weighted(constant(1.0, 3.0), schedule), task=constant(1.0, 1.0)
    )
    for step, weight in enumerate([8, 6, 4, 2, 0, 0]):
        values, _, metrics = applied(method, at=context(step))
        np.testing.assert_allclose(values, [weight + 1, 3 * weight + 1])
        assert metrics["hint"] == 2
        assert metrics["hint/weighted"] == 2 * weight


def test_a_schedule_that_starts_at_zero_is_a_weight():
    method = objective(hint=weighted(constant(1.0), lambda step: jnp.zeros(())))
    assert applied(method)[0] == 0


def test_an_adjustable_weight_is_that_of_the_memory():
    """The weight multiplies its schedule; the memory holds it beside the terms."""
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    method = objective(
        a=weighted(constant(1.0, 3.0), Adjustable(8)),
        b=weighted(constant(1.0, 1.0), Adjustable(0.0, schedule)),
        c=constant(0.0, 0.0),
    )
    params, memory = method.init(KEY, NOTHING, NOTHING, None)
    assert set(params) == {"a", "b", "c"} == memory.keys() - {"weights"}
    assert memory["weights"] == {"a": 8, "b": 0}
    memory["weights"] |= {"b": jnp.array(4.0)}
    values, after, metrics = method.apply(
        params, memory, NOTHING, NOTHING, {}, context(step=1)
    )
    np.testing.assert_allclose(values, [8 + 3, 24 + 3])
    assert metrics["a"] == 2
    assert metrics["a/weighted"] == 16
    assert after["weights"] == {"a": 8, "b": 4}


def test_adjustable_weights_are_whole_on_every_device_and_chosen_like_all_else():
    def of(part):
        return lambda *arguments: (part, *arguments)

    own = constant(1.0)._replace(split=of("rows"), select=of("mine"))
    method = objective(a=weighted(own, Adjustable(2.0)), b=constant(1.0))
    memory = {"a": 1, "b": 2, "weights": {"a": 3.0}}
    nowhere = PartitionSpec()
    assert method.split(memory) == {"a": ("rows", 1), "b": nowhere, "weights": nowhere}
    before = {"a": 4, "b": 5, "weights": {"a": 6.0}}
    bad = jnp.array(False)
    chosen = method.select(bad, memory, before, {})
    assert chosen["a"] == ("mine", bad, 1, 4, {})
    assert chosen["b"] == 5
    assert chosen["weights"] == {"a": 6}


def test_means_are_over_the_valid_examples():
    batch = {"where": jnp.array([True, False, True, False])}
    method = objective(a=weighted(constant(1.0, 50.0, 2.0, 70.0), 2.0))
    values, _, metrics = applied(method, batch)
    assert values.shape == (4,)
    assert metrics["a"] == 1.5
    assert metrics["a/weighted"] == metrics["loss"] == 3
    nobody = applied(method, {"where": jnp.zeros(4, bool)})[2]
    assert nobody["loss"] == nobody["a"] == 0


def test_a_nan_of_an_example_that_does_not_count_is_not_reported():
    batch = {"where": jnp.array([True, False])}
    _, _, metrics = applied(objective(a=constant(1.0, np.nan)), batch)
    assert metrics["loss"] == 1


def test_own_metrics_are_reported_under_the_name_of_the_term():
    method = objective(hint=constant(1.0, r2=0.5), outer=objective(inner=seen()))
    _, _, metrics = applied(method, at=context(3, False))
    assert metrics["hint/r2"] == 0.5
    assert metrics["outer/inner/step"] == 3
    assert metrics["outer/inner/train"] is False


@pytest.mark.parametrize(
    "name", ["loss", "norm", "skipped", "spikes", "weights", "prepared"]
)
def test_a_term_cannot_take_the_name_of_what_a_stage_reports_or_keeps(name):
    with pytest.raises(ValueError, match="no term with a name among"):
        objective(**{name: constant(1.0), "other": constant(2.0)})


def test_memory_and_parameters_go_by_the_names_of_the_terms():
    method = objective(a=constant(1.0), b=seen())
    params, memory = method.init(KEY, NOTHING, NOTHING, None)
    assert set(params) == set(memory) == {"a", "b"}
    _, memory, _ = method.apply(params, memory, NOTHING, NOTHING, {}, context())
    assert memory == {"a": {"calls": 1}, "b": {}}


def test_a_key_depends_on_the_name_of_its_term_alone():
    def draws(key=KEY, **terms):
        metrics = applied(objective(**terms), at=context(key=key))[2]
        return {n: float(v) for n, v in metrics.items() if n.endswith("/draw")}

    alone = draws(mask=seen())
    many = draws(first=seen(), mask=seen(), task=constant(1.0))
    assert many["mask/draw"] == alone["mask/draw"]
    assert many["mask/draw"] != many["first/draw"]
    assert draws(jax.random.key(1), mask=seen()) != alone


def test_initialization_depends_on_the_name_of_the_term_alone():
    def made(**terms):
        return objective(**terms).init(KEY, NOTHING, NOTHING, None)[0]

    many = made(a=constant(1.0), hint=constant(1.0))
    alone = made(hint=constant(5.0))
    np.testing.assert_array_equal(alone["hint"]["at"], many["hint"]["at"])
    assert (many["hint"]["at"] != many["a"]["at"]).any()


def test_an_objective_wants_what_its_terms_want():
    method = objective(
        a=constant(wants=Wants(hints=("x", "y"))),
        b=constant(wants=Wants(True, ("y", "z"), ("head",))),
    )
    assert method.student == Wants(True, ("x", "y", "z"), ("head",))
    assert method.teacher == Wants()


def test_union_keeps_the_order_and_each_thing_once():
    assert union() == Wants()
    one, two = Wants(hints=("b", "a")), Wants(hints=("a", "c"), params=("p",))
    assert union(one, two) == Wants(False, ("b", "a", "c"), ("p",))
    assert union(one, union(one)) == one


@pytest.mark.parametrize("weight", [-1.0, -1e-9, np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match="weighted: expected a finite weight >= 0"):
        weighted(constant(1.0), weight)
    with pytest.raises(ValueError, match="weighted: expected a finite weight >= 0"):
        weighted(constant(1.0), Adjustable(weight))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "objective: expected a term with a weight > 0, got no terms"),
        ({"a": 0.0, "b": 0.0}, r"the terms \['a', 'b'\] with weight 0"),
    ],
)
def test_an_objective_of_nothing_is_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        objective(**{k: weighted(constant(1.0), w) for k, w in terms.items()})


def test_a_whole_number_is_a_weight():
    assert applied(objective(a=weighted(constant(1.0), 2)))[0] == 2


def test_weighted_is_a_method_and_its_weight():
    method = constant(1.0)
    assert weighted(method, 2.0) == Weighted(method, 2.0)


# The task


def test_task_reports_its_loss_and_its_accuracy():
    logits = jnp.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    batch = {"label": jnp.array([0, 0, 0, 1])}
    values, _, metrics = applied(task(cross_entropy), batch, output=logits)
    np.testing.assert_allclose(
        values, -jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]], rtol=1e-5
    )
    assert metrics == {"accuracy": 0.75}
    batch["where"] = jnp.array([True, True, False, False])
    assert applied(task(cross_entropy), batch, output=logits)[2]["accuracy"] == 0.5


def test_task_takes_other_labels_and_float_targets():
    batch = {"target": jnp.array([[1.0], [3.0]])}
    method = task(lambda y, t: jnp.square(y - t).mean(-1), label="target")
    values, _, metrics = applied(method, batch, output=jnp.array([[2.0], [5.0]]))
    assert values.tolist() == [1, 4]
    assert metrics == {}


def test_task_computes_in_float32():
    batch = {"label": jnp.array([1])}
    logits = jnp.array([[1.0, 1.0078125]], jnp.bfloat16)
    values, _, _ = applied(task(cross_entropy), batch, output=logits)
    assert values.dtype == jnp.float32
    wide = np.float64(logits)
    np.testing.assert_allclose(
        values, np.log(np.exp(wide).sum(-1)) - wide[:, 1], rtol=1e-6
    )


def test_task_refuses_an_output_of_integers():
    with pytest.raises(TypeError, match="task: expected floating-point"):
        applied(
            task(cross_entropy), {"label": jnp.array([1])}, output=jnp.ones((1, 2), int)
        )


def test_missing_labels_are_named():
    with pytest.raises(ValueError, match="label"):
        applied(task(cross_entropy), {"image": 0}, output=jnp.ones((1, 2)))


def test_a_task_loss_that_is_already_a_mean_is_refused():
    method = objective(
        task=task(lambda y, label: cross_entropy(y, label).mean()),
        other=constant(1.0, 2.0),
    )
    with pytest.raises(ValueError, match="one value per example"):
        applied(method, {"label": jnp.array([0, 1])}, output=jnp.ones((2, 2)))


# Pairs


def difference(student, teacher):
    return jnp.square(student - teacher).mean(-1) * jnp.abs(teacher).max(-1)


@pytest.mark.parametrize(
    "shapes", [[(3,)], [(3,), (3,), (3,)], [(3,), (4,), (3,), (1,), (4,)]]
)
@pytest.mark.parametrize("half", [False, True])
def test_over_pairs_is_the_loop(shapes, half):
    """Pairs can have any order, shapes and dtypes."""
    generator = np.random.default_rng(0)
    dtypes = [jnp.bfloat16 if half and i == 2 else jnp.float32 for i in range(5)]
    students, teachers = (
        [
            generator.normal(size=(2, *shape)).astype(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=False)
        ]
        for _ in range(2)
    )

    def loss(student, teacher):
        return difference(student.astype(jnp.float32), teacher.astype(jnp.float32))

    got = jax.jit(over_pairs(loss))(students, teachers)
    want = 0
    for s, t in zip(students, teachers, strict=True):
        s, t = np.float64(s), np.float64(t)
        want += np.square(s - t).mean(-1) * np.abs(t).max(-1)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_over_pairs_has_the_gradient_of_the_loop():
    students = [np.arange(n * 2, dtype=np.float32).reshape(2, n) for n in (3, 4, 3)]
    teachers = [np.cos(s) for s in students]

    def loop(students, teachers):
        return sum(map(difference, students, teachers))

    def gradient(summed):
        return jax.jit(jax.grad(lambda s, t: summed(s, t).sum()))(students, teachers)

    for got, want in zip(gradient(over_pairs(difference)), gradient(loop), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_over_pairs_traces_the_loss_once_for_each_shape():
    shapes = []

    def loss(student, teacher):
        shapes.append(student.shape)
        return (student - teacher).sum(-1)

    over_pairs(loss)(
        [jnp.ones((2, n)) for n in (3, 4, 3, 3)],
        [jnp.ones((2, n)) for n in (3, 4, 3, 3)],
    )
    assert shapes == [(2, 3), (2, 4)]


def test_over_pairs_needs_a_teacher_for_each_student():
    with pytest.raises(ValueError, match="zip"):
        over_pairs(difference)([jnp.ones((2, 3))], [])


def test_a_schedule_that_gives_several_weights_is_refused():
    terms = hj.objective(kd=hj.weighted(hj.kd(), lambda step: jnp.ones(4)))
    shown = Features(output=jnp.ones((4, 3)))
    context = Context(jax.random.key(0), jnp.int32(0), True)
    params, memory = terms.init(jax.random.key(0), shown, shown, None)
    batch = {"label": jnp.zeros(4, int)}
    with pytest.raises(hj.Refusal, match=r"one number, got float32 \(4,\)"):
        jax.eval_shape(
            lambda: terms.apply(params, memory, shown, shown, batch, context)[0]
        )
