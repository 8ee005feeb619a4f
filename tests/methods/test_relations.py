"""Methods that compare what they see as it is: their losses, and padding left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax
from hintjax import losses
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

PAIRS = [("s1", "t1"), ("s2", "t2")]
CONTEXT = Context(jax.random.key(0), jnp.int32(0), True)


def relational_loss(student, teacher):
    distance = losses.distance_loss(student, teacher)
    return 25 * distance + 50 * losses.angle_loss(student, teacher)


HINTS = {
    "similarity_preserving": losses.similarity_loss,
    "relational": relational_loss,
    "probability_transfer": losses.probability_loss,
    "channel_wise": losses.channel_loss,
}
HINTS = {name: jax.jit(loss) for name, loss in HINTS.items()}


def applied(method):
    """`method.apply` in the one context of these tests, as one program."""
    return jax.jit(lambda *arguments: method.apply(*arguments, CONTEXT))


def begun(method, student, teacher):
    key = jax.random.key(0)
    return jax.jit(lambda key: method.init(key, student, teacher, None))(key)


def hints(size=6):
    generator = np.random.default_rng(0)
    shapes = {"s1": (4, 4, 3), "t1": (4, 4, 3), "s2": (2, 3, 5), "t2": (2, 3, 5)}
    draw = {
        name: jnp.array(generator.normal(size=(size, *shape)), jnp.float32)
        for name, shape in shapes.items()
    }
    student, teacher = ({n: draw[n] for n in draw if n[0] == side} for side in "st")
    return Features(hints=student), Features(hints=teacher)


def outputs(size=6):
    generator = np.random.default_rng(0)
    draw = (jnp.array(generator.normal(size=(size, 7)), jnp.float32) for _ in "st")
    return [Features(output=x) for x in draw]


def padded(features, size=2):
    """With examples of nan behind: what fills up the last batch of an evaluation."""

    def pad(x):
        return np.pad(x, [(0, size)] + (x.ndim - 1) * [(0, 0)], constant_values=np.nan)

    return jax.tree.map(pad, features)


@pytest.mark.parametrize("name", HINTS)
def test_the_values_are_the_loss_summed_over_pairs(name):
    student, teacher = hints()
    method = getattr(hintjax, name)(PAIRS)
    params, before = method.init(jax.random.key(0), student, teacher, None)
    values, memory, _ = applied(method)(params, before, student, teacher, {})
    loss = HINTS[name]
    want = sum(np.asarray(loss(student.hints[s], teacher.hints[t])) for s, t in PAIRS)
    np.testing.assert_allclose(values, want, rtol=1e-5)
    assert memory == before
    assert not jax.tree.leaves((params, memory))


@pytest.mark.parametrize("name", [*HINTS, "correlation_congruence"])
def test_padding_is_compared_with_none(name):
    student, teacher = hints()
    method = getattr(hintjax, name)(PAIRS)
    params, memory = begun(method, student, teacher)
    where = np.arange(8) < 6
    want, _, metrics = applied(method)(params, memory, student, teacher, {})
    got, _, others = applied(method)(
        params, memory, *map(padded, (student, teacher)), {"where": where}
    )
    np.testing.assert_allclose(np.asarray(got)[:6], want, rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(got)[6:], 0)
    for metric in metrics:
        np.testing.assert_allclose(others[metric], metrics[metric], rtol=1e-4)


def test_dist_is_its_loss_without_the_padding():
    student, teacher = outputs()
    method = hintjax.dist(2.0, 0.5, temperature=4.0)
    loss = functools.partial(losses.dist_loss, beta=2.0, gamma=0.5, temperature=4.0)
    want = jax.jit(loss)(student.output, teacher.output)
    batch = {"where": np.arange(8) < 6}
    arguments = (*map(padded, (student, teacher)), batch)
    got = np.asarray(applied(method)({}, {}, *arguments)[0])
    np.testing.assert_allclose(got[:6], want, rtol=1e-4)
    np.testing.assert_array_equal(got[6:], 0)


def test_decoupled_kd_is_its_loss_of_the_labels():
    student, teacher = outputs()
    label = jnp.array([0, 1, 2, 3, 4, 6])
    hyper = {"alpha": 0.5, "beta": 2.0, "temperature": 3.0}
    loss = jax.jit(functools.partial(losses.decoupled_kd_loss, **hyper))
    want = loss(student.output, teacher.output, label)
    method = hintjax.decoupled_kd(**hyper, label="fine")
    got, _, _ = applied(method)({}, {}, student, teacher, {"fine": label})
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_relational_reports_its_parts_and_skips_a_weight_of_0():
    student, teacher = hints()
    method = hintjax.relational(PAIRS[:1], distance=3.0, angle=0.0)
    values, _, metrics = applied(method)({}, {}, student, teacher, {})
    distance = jax.jit(losses.distance_loss)(student.hints["s1"], teacher.hints["t1"])
    distance = np.asarray(distance)
    np.testing.assert_allclose(values, 3 * distance, rtol=1e-6)
    np.testing.assert_allclose(metrics["distance"], distance.mean(), rtol=1e-6)
    assert set(metrics) == {"distance"}


def test_correlation_congruence_trains_two_heads_per_pair():
    student, teacher = hints()
    method = hintjax.correlation_congruence(PAIRS, feature_dim=9)
    params, memory = begun(method, student, teacher)
    assert memory == {}
    assert set(params) == {"s1->t1", "s2->t2"}
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    assert sorted(x.shape for x in kernels) == [(30, 9), (30, 9), (48, 9), (48, 9)]
    values, _, _ = applied(method)(params, {}, student, teacher, {})
    rows = {"student": student.hints, "teacher": teacher.hints}
    rows, params = jax.device_get((rows, params))
    want = 0.0
    for pair in PAIRS:
        heads = params["->".join(pair)]
        embedded = []
        for (side, layers), layer in zip(rows.items(), pair, strict=True):
            kernel, bias = sorted(jax.tree.leaves(heads[side]), key=lambda x: -x.ndim)
            embedded.append(layers[layer].reshape(6, -1) @ kernel + bias[None])
        want = want + np.asarray(jax.jit(losses.correlation_loss)(*embedded))
    np.testing.assert_allclose(values, want, rtol=1e-4)


@pytest.mark.parametrize("name", [*HINTS, "correlation_congruence"])
def test_no_pairs_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least one pair"):
        getattr(hintjax, name)([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hintjax.relational(PAIRS, distance=-1.0),
            "relational: .*distance to be >= 0",
        ),
        (
            lambda: hintjax.relational(PAIRS, distance=0.0, angle=0.0),
            "one weight > 0, got",
        ),
        (lambda: hintjax.dist(beta=-1.0), "dist: expected beta to be >= 0"),
        (lambda: hintjax.dist(temperature=0.0), "dist: expected temperature"),
        (lambda: hintjax.decoupled_kd(alpha=-1.0), "decoupled_kd: .*alpha to be >= 0"),
        (lambda: hintjax.decoupled_kd(temperature=0.0), "decoupled_kd: .*temperature"),
        (lambda: hintjax.channel_wise(PAIRS, temperature=-1.0), "channel_wise: .*temp"),
        (
            lambda: hintjax.correlation_congruence(PAIRS, feature_dim=0),
            "correlation_congruence: expected feature_dim",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
