"""The task: its loss, the labels that it leaves out, and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import metrics
from hintjax.method import Context, Data
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(0)


def squared(output, labels):
    return jnp.square(output - labels)


def sigmoid(output, labels):
    return optax.sigmoid_binary_cross_entropy(output, labels.astype(output.dtype))


def applied(method, output, label, teacher=None, **more):
    batch = {"label": label, **more}
    context = Context(KEY, jnp.int32(0), True)
    shown = Features(output=output), Features(output=teacher)
    # One program: without it, every operation would be compiled by itself.
    run = jax.jit(lambda *a: method.apply({}, {}, *a, context))
    values, _, found = run(*shown, batch)
    return values, found


def drawn(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def traced(method, output, label, dtype=jnp.int32, **more):
    """What the method gives for these shapes."""
    shapes = jax.ShapeDtypeStruct(output, jnp.float32)
    labels = jax.ShapeDtypeStruct(label, dtype)
    return jax.eval_shape(lambda o, y: applied(method, o, y, **more), shapes, labels)


# Metrics


@pytest.mark.parametrize(
    "output, label, dtype",
    [
        ((8,), (8,), jnp.int32),  # a sigmoid logit
        ((8, 1), (8, 1), jnp.int32),  # a sigmoid logit, or an integer regression
        ((8, 1), (8, 1), jnp.float32),
        ((8, 3), (8, 3), jnp.float32),  # soft labels, or a regression
        ((8, 3), (8, 3), jnp.int32),  # an example may be of many classes
    ],
)
def test_labels_that_are_no_classes_have_no_metric(output, label, dtype):
    values, found = traced(hj.task(sigmoid), output, label, dtype)
    assert values.shape == (8,) and found == {}


def test_one_logit_has_the_metric_that_is_given():
    """An argmax of one column is always 0."""
    output, label = drawn(50, 1), jnp.array(drawn(50, 1) > 0, jnp.int32)
    method = hj.task(sigmoid, metrics={"right": metrics.binary_accuracy})
    assert applied(method, output, label)[1] == {"right": 1}
    assert applied(method, output, 1 - label)[1] == {"right": 0}


def test_metrics_count_the_valid_examples():
    output, label = jnp.array([[1.0], [5.0], [9.0]]), jnp.array([[0.0], [7.0], [0.0]])
    method = hj.task(squared, metrics={"error": metrics.absolute_error})
    where = jnp.array([True, True, False])
    assert applied(method, output, label, where=where)[1] == {"error": 1.5}
    assert applied(hj.task(squared, metrics={}), output, label)[1] == {}


def test_several_metrics_are_reported_by_name():
    named = {"f1": metrics.f1, "right": metrics.binary_accuracy}
    values, found = traced(hj.task(sigmoid, metrics=named), (8, 3), (8, 3))
    assert set(found) == {"f1", "right"} and values.shape == (8,)


# Labels that are left out


@pytest.mark.parametrize("stray", [255, -100, -1])
def test_ignored_examples_leave_loss_gradient_and_metric(stray):
    output, label = np.asarray(drawn(6, 3)), np.array([0, stray, 2, 1, stray, 2])
    label, kept = label.astype(np.int32), np.array([0, 2, 3, 5])
    method = hj.task(cross_entropy, ignore=stray)

    def total(output):
        values, found = applied(method, output, label)
        return values.sum(), (values, found)

    run = jax.jit(jax.grad(total, has_aux=True))
    by_output, (values, found) = jax.device_get(run(output))
    alone, right = applied(hj.task(cross_entropy), output[kept], label[kept])
    np.testing.assert_allclose(values[kept], alone, rtol=1e-6)
    assert values[1] == values[4] == 0
    assert np.all(by_output[[1, 4]] == 0) and np.isfinite(by_output).all()
    np.testing.assert_allclose(found["accuracy"], right["accuracy"], rtol=1e-6)


def test_dense_labels_give_the_mean_over_the_valid_positions():
    output = np.array(drawn(4, 3, 3, 5))
    output[0, 0, 0] = np.nan
    label = np.random.default_rng(1).integers(0, 5, (4, 3, 3)).astype(np.int32)
    label[0, 0], label[3] = 255, -1
    where = jnp.array([True, True, False, True])
    method = hj.task(cross_entropy, ignore=(255, -1))
    values, found = applied(method, output, label, where=where)
    logs = np.asarray(jax.jit(lambda x: -jax.nn.log_softmax(x))(output))
    rights = np.argmax(output, -1) == label
    for i, valid in enumerate((np.s_[1:], np.s_[:], np.s_[:])):
        of, at = logs[i][valid].reshape(-1, 5), label[i][valid].ravel()
        np.testing.assert_allclose(values[i], of[range(len(at)), at].mean(), rtol=1e-5)
    assert values[3] == 0
    right = np.mean([rights[0, 1:].mean(), rights[1].mean()])
    np.testing.assert_allclose(found["accuracy"], right, rtol=1e-6)


def test_a_loss_per_label_is_averaged_over_the_labels_of_an_example():
    output, label = drawn(4, 3), drawn(4, 3, seed=1)
    values, _ = applied(hj.task(squared), output, label)
    want = np.square(np.asarray(output) - np.asarray(label)).mean(-1)
    np.testing.assert_allclose(values, want, rtol=1e-6)


def test_without_ignored_labels_the_program_is_that_of_the_loss_alone():
    output, label = drawn(6, 3), jnp.arange(6) % 3
    values, found = applied(hj.task(cross_entropy), output, label)
    np.testing.assert_array_equal(values, cross_entropy(output, label))
    right = (output.argmax(-1) == label).astype(output.dtype).mean()
    np.testing.assert_array_equal(found["accuracy"], right)


# Sentences


@pytest.mark.parametrize(
    "loss, output, label, dtype, sentence",
    [
        (cross_entropy, (8, 3), (4,), jnp.int32, r"labels of 8 examples, as the out"),
        (cross_entropy, (8, 3), (8, 3), jnp.int32, r"labels that the loss takes, got"),
        (
            cross_entropy,
            (8, 3),
            (8, 3),
            jnp.float32,
            r"got output float32 \(8, 3\) and",
        ),
        (
            cross_entropy,
            (8, 3),
            (),
            jnp.int32,
            r"labels of 8 examples.* got int32 \(\)",
        ),
        (squared, (8, 1, 1), (8, 1, 4), jnp.float32, r"one value per example, \(8,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_a_sentence(
    unchecked, loss, output, label, dtype, sentence
):
    with pytest.raises(hj.Refusal, match=rf"task: expected .*{sentence}"):
        traced(hj.task(loss), output, label, dtype)


def test_values_that_broadcast_by_accident_are_refused(unchecked):
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(hj.Refusal, match=r"one value per example.* got \(8, 8\)"),
    ):
        traced(hj.task(squared), (8, 1), (8,), jnp.float32)


def test_an_error_of_jax_inside_the_loss_stays_what_it_is():
    def branching(output, labels):
        return output[:, 0] if output[0, 0] > 0 else output[:, 1]

    with pytest.raises(jax.errors.TracerBoolConversionError):
        traced(hj.task(branching), (8, 3), (8,))


@pytest.mark.parametrize(
    "given, kind, sentence",
    [
        ({"ignore": "255"}, TypeError, "ignore to be an integer, or several"),
        ({"ignore": True}, TypeError, "ignore to be an integer, or several"),
        ({"metrics": {"weighted": metrics.f1}}, ValueError, "no metric named"),
        ({"metrics": {"f1": 3}}, TypeError, "the metric 'f1' to be a"),
        ({"metrics": ["f1"]}, TypeError, "metrics to be"),
    ],
)
def test_arguments_are_checked(unchecked, given, kind, sentence):
    with pytest.raises(kind, match=f"task: expected {sentence}"):
        hj.task(cross_entropy, **given)


def test_only_integers_are_ignored():
    with pytest.raises(hj.Refusal, match="integer labels, got float32"):
        traced(hj.task(squared, ignore=255), (8, 3), (8, 3), jnp.float32)


def test_a_loss_that_hides_the_labels_it_should_leave_out_is_refused():
    """It takes its mean over the ignored positions too."""
    method = hj.task(lambda y, t: cross_entropy(y, t).mean(-1), ignore=255)
    with pytest.raises(hj.Refusal, match=r"per label that it may leave out, \(8, 4\)"):
        traced(method, (8, 4, 3), (8, 4))


def test_a_metric_gives_one_value_per_example():
    method = hj.task(cross_entropy, metrics={"mean": lambda y, t: y.mean()})
    with pytest.raises(hj.Refusal, match=r"the metric 'mean' to give one value per"):
        traced(method, (8, 3), (8,))


# Methods that need labels, and methods that need none


def test_methods_without_labels_do_not_touch_them():
    method = hj.simkd(("a", "x"))
    head = {"kernel": jnp.ones((5, 3))}
    student = Features(hints={"a": jnp.ones((4, 4, 4, 3))})
    teacher = Features(hints={"x": jnp.ones((4, 4, 4, 5))}, params={"classifier": head})

    def run(key, label):
        params, memory = method.init(key, student, teacher, None)
        context = Context(key, jnp.int32(0), True)
        batch = {"label": label}
        return method.apply(params, memory, student, teacher, batch, context)[2]

    for label in (drawn(4, 3), jnp.zeros((4, 3), jnp.int32), jnp.zeros((4, 1), int)):
        assert jax.eval_shape(run, KEY, label) == {}
    assert set(jax.eval_shape(run, KEY, jnp.zeros(4, jnp.int32))) == {"accuracy"}


@pytest.mark.parametrize("missing", ["label", "index"])
@pytest.mark.parametrize(
    "negatives", [hj.AnchorNegatives(4), hj.SharedNegatives(4), hj.BatchNegatives()]
)
def test_crd_says_which_entry_of_the_batch_it_misses(missing, negatives):
    method = hj.crd(("a", "x"), negatives=negatives, feature_dim=4)
    shown = Features(hints={"a": jnp.ones((4, 3))}), Features(hints={"x": drawn(4, 5)})
    batch = {"label": jnp.arange(4) % 2, "index": jnp.arange(4)}
    del batch[missing]

    def run(key):
        data = Data(jnp.arange(8) % 2)
        params, memory = method.init(key, *shown, data)
        context = Context(key, jnp.int32(0), True)
        return method.apply(params, memory, *shown, batch, context)[0]

    if missing == "index" and isinstance(negatives, hj.BatchNegatives):
        assert jax.eval_shape(run, KEY).shape == (4,)
        return
    with pytest.raises(hj.Refusal, match=f"crd: expected '{missing}' in the batch"):
        jax.eval_shape(run, KEY)


def test_decoupled_kd_says_that_it_needs_labels():
    with pytest.raises(hj.Refusal, match="decoupled_kd: expected 'y' in the batch"):
        applied(hj.decoupled_kd(label="y"), drawn(4, 3), None, drawn(4, 3))


def test_a_loss_that_broadcasts_examples_over_each_other_is_refused():
    """The differences of outputs (n, 1) and labels (n,) are those of all pairs."""
    labels = jnp.arange(4.0)
    student = Features(jnp.ones((4, 1)))

    def values(loss):
        context = Context(jax.random.key(0), jnp.int32(0), True)
        method, batch = hj.task(loss), {"label": labels}
        return method.apply({}, {}, student, Features(), batch, context)[0]

    def crossed(output, label):
        return jnp.square(output - label[None]).mean(-1)

    wanted = r"got one that broadcasts output \(4, 1\) over labels \(4,\)\. Drop "
    with pytest.raises(hj.Refusal, match=wanted):
        values(crossed)
    with pytest.raises(hj.Refusal, match=wanted):
        values(jax.jit(crossed))
    right = values(lambda output, label: jnp.square(output[:, 0] - label))
    np.testing.assert_array_equal(right, jnp.square(1 - labels))
    apart = values(jax.vmap(lambda output, label: jnp.square(output - label).sum()))
    np.testing.assert_array_equal(apart, right)
    values(lambda output, label: jnp.square(output).sum(-1))
