"""Several teachers at once, the student as its own teacher, a moving average."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import teachers
from hintjax.networks import Wants

KEY = jax.random.key(0)
CLASSES = 3
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Net(nn.Module):
    """Two layers with BatchNorm between them, and a head on each."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(self.width, name="low")(x.reshape(len(x), -1)))
        early = nn.Dense(CLASSES, name="early")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(nn.Dense(self.width, name="high")(x))
        return nn.Dense(CLASSES, name="head")(x) + 0 * early


def images(size=6):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(size, 2, 2, 1)).astype(np.float32)
    label = np.arange(size, dtype=np.int32) % CLASSES
    return jax.tree.map(jnp.asarray, {"image": image, "label": label})


BATCH = images()
STUDENT, BIG, OTHER = (hj.linen(Net(width)) for width in (4, 6, 5))


def start(network, seed=0):
    return jax.jit(network.init)(jax.random.key(seed), BATCH["image"])


def after_one_step(student, teacher, theirs, method, key=KEY):
    stage = hj.distillation_stage(student, teacher, method, optax.sgd(0.1))
    state = stage.init(key, start(STUDENT), theirs, BATCH)
    return stage.update(state, theirs, BATCH)


def test_two_teachers_teach_as_each_of_them_alone():
    both = teachers.together(big=BIG, other=OTHER)
    theirs = start(both, 1)
    big, other = (
        hj.Variables(theirs.params[name], theirs.state[name])
        for name in ("big", "other")
    )
    hint = [("low", "high")]
    method = hj.objective(
        kd=hj.weighted(hj.from_teacher(hj.kd(2.0), "big"), 0.5),
        hint=hj.from_teacher(hj.fitnets(hint), "other"),
    )
    state, metrics = after_one_step(STUDENT, both, theirs, method)
    _, alone = after_one_step(STUDENT, BIG, big, hj.objective(kd=hj.kd(2.0)))
    _, apart = after_one_step(
        STUDENT, OTHER, other, hj.objective(hint=hj.fitnets(hint))
    )
    np.testing.assert_allclose(metrics["kd"], alone["kd"], rtol=1e-6)
    np.testing.assert_allclose(metrics["hint"], apart["hint"], rtol=1e-6)
    assert set(state.params["regressors"]["hint"]) == {"low->high"}
    assert list(both.layers(*theirs, BATCH["image"]))[:2] == ["big/low", "big/early"]


@pytest.mark.quick
def test_what_no_method_wants_of_a_teacher_is_not_computed():
    both = teachers.together(big=BIG, other=OTHER)
    method = hj.from_teacher(hj.fitnets([("low", "low")]), "big")
    stage = hj.distillation_stage(STUDENT, both, method, optax.sgd(0.1))
    theirs = jax.eval_shape(lambda: start(both))
    jaxpr = jax.make_jaxpr(lambda v: stage.teach(None, v, BATCH))(theirs)
    used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr.jaxpr, [True])[1]
    read = jax.tree.unflatten(jax.tree.structure(theirs), used)
    assert any(jax.tree.leaves(read.params["big"]["low"]))
    assert not any(jax.tree.leaves((read.params["other"], read.params["big"]["high"])))


@pytest.mark.quick
def test_a_path_of_no_teacher_names_the_nearest():
    both = teachers.together(big=BIG, other=OTHER)
    method = hj.fitnets([("low", "bigg/low")])
    with pytest.raises(
        ValueError, match=r"together: expected .*'bigg/low'.*Nearest: big"
    ):
        after_one_step(STUDENT, both, start(both), method)
    with pytest.raises(ValueError, match="together: expected at least one network"):
        teachers.together()


@pytest.mark.quick
def test_one_of_the_teachers_sees_other_inputs():
    doubled = teachers.seeing(BIG, lambda x: 2 * x)
    variables, wants = start(BIG), Wants(output=True)
    got, _ = doubled.apply(*variables, BATCH["image"], wants=wants, train=False)
    want, _ = BIG.apply(*variables, 2 * BATCH["image"], wants=wants, train=False)
    np.testing.assert_array_equal(got.output, want.output)
    assert list(doubled.layers(*variables, BATCH["image"])) == list(
        BIG.layers(*variables, BATCH["image"])
    )


@pytest.mark.quick
def test_a_student_teaches_itself_from_deep_to_shallow():
    early = hj.at_head(hj.kd(1.0), student="early")
    method = hj.objective(kd=hj.self_taught(early))
    assert method.teacher == Wants()
    before = start(STUDENT)
    state, metrics = after_one_step(STUDENT, None, None, method)
    assert metrics["kd"] > 0
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), state.params["student"], before.params
    )
    assert moved["early"]["kernel"] and moved["low"]["kernel"]
    # The deep layers are the teacher: no gradient reaches them.
    assert not any(jax.tree.leaves((moved["head"], moved["high"], moved["norm"])))


@pytest.mark.quick
def test_a_student_teaches_itself_hints():
    method = hj.objective(hint=hj.self_taught(hj.fitnets([("low", "high")])))
    state, _ = after_one_step(STUDENT, None, None, method)
    assert set(state.params["regressors"]["hint"]) == {"low->high"}


def test_a_moving_average_teaches_and_survives_the_updates():
    method = hj.objective(task=hj.task(cross_entropy), kd=hj.kd())
    stage = hj.distillation_stage(STUDENT, STUDENT, method, optax.sgd(0.1))
    average = jax.jit(teachers.moving_average, static_argnames="decay")
    ours = start(STUDENT)
    state = stage.init(KEY, ours, ours, BATCH)
    teacher = jax.tree.map(jnp.copy, hj.student_variables(state))
    want = jax.device_get(teacher)
    for _ in range(3):
        state, metrics = stage.update(state, teacher, BATCH)
        student = hj.student_variables(state)
        teacher = average(teacher, student, decay=0.75)
        want = jax.tree.map(lambda t, s: 0.75 * t + 0.25 * np.asarray(s), want, student)
    assert np.isfinite(metrics["loss"])
    chex.assert_trees_all_close(teacher, want, rtol=1e-5)
