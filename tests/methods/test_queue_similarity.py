"""The queue as a method: the published code, skipped steps, evaluation, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hintjax as hj
from hintjax import losses
from hintjax.method import Context, Data
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)
PAIR = ("a", "x")


def linear(case, name, kind="param"):
    head = f"{kind}.student_projection_head{name}"
    return {"kernel": case[f"{head}.weight"], "bias": case[f"{head}.bias"]}


def begun(method, student, teacher):
    """As one program: otherwise every operation would be one."""
    return jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)


def gradients(method, params, memory, student, teacher):
    def run(params, student):
        values, after, _ = method.apply(params, memory, student, teacher, {}, CONTEXT)
        return values.mean(), after

    return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, student)


def assert_gradient(case, got, name=""):
    for part, key in ("kernel", "weight"), ("bias", "bias"):
        want = f"grad.param.student_projection_head{name}.{key}"
        assert case.error(want, got[part]) < 1e-5


@pytest.mark.parametrize("kind", ["larger_half_filled", "smaller_b6_q4"])
def test_the_method_is_lightlys_first_version(golden, kind):
    case = golden(f"lightly_v1/queue_{kind}")
    queue = case["state.teacher_queue"]
    method = hj.queue_similarity(PAIR, size=queue.shape[0])
    student = Features(hints={"a": case["in.f_s"]})
    teacher = Features(hints={"x": case["in.f_t"]})
    params, memory = begun(method, student, teacher)
    assert memory["queue"].shape == queue.shape
    params = {"regressor": {"linear": linear(case, "")}}
    (value, after), grads = gradients(
        method, params, {"queue": queue}, student, teacher
    )
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", grads[1].hints["a"]) < 1e-5
    assert_gradient(case, grads[0]["regressor"]["linear"])
    assert case.error("state_out.teacher_queue", after["queue"]) < 1e-6


def test_local_and_global_terms_are_lightlys_third_version(golden):
    case = golden("lightly_v3/6x4_to_5x7")
    method = hj.objective(
        whole=hj.weighted(hj.queue_similarity(PAIR, size=8), 1.0),
        parts=hj.weighted(
            hj.dense_matching([("b", "y")], loss=losses.position_similarity_loss), 1.0
        ),
    )
    student = Features(hints={"a": case["in.g_s"], "b": case["in.f_s"]})
    teacher = Features(hints={"x": case["in.g_t"], "y": case["in.f_t"]})
    params, memory = begun(method, student, teacher)
    one, other = linear(case, "_global"), linear(case, "_local")
    params = {
        "whole": {"regressor": {"linear": one}},
        "parts": {"b->y": {"regressor": {"layers_0": other}}},
    }
    memory["whole"]["queue"] = case["state.teacher_queue"]
    (value, after), grads = gradients(method, params, memory, student, teacher)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.g_s", grads[1].hints["a"]) < 1e-5
    assert case.error("grad.in.f_s", grads[1].hints["b"]) < 1e-5
    assert_gradient(case, grads[0]["whole"]["regressor"]["linear"], "_global")
    own = grads[0]["parts"]["b->y"]["regressor"]["layers_0"]
    assert_gradient(case, own, "_local")
    assert case.error("state_out.teacher_queue", after["whole"]["queue"]) < 1e-6


def test_only_good_training_steps_change_the_queue():
    def apply(params, state, inputs, *, wants, train, key=None):
        hints = dict.fromkeys(wants.hints, inputs[:, 0, 0] @ params["kernel"])
        return Features(None, hints, {}), state

    network = hj.Network(None, apply, None)
    ours, theirs = (
        hj.Variables({"kernel": np.full((3, n), 1 / n, "f")}, {}) for n in (4, 5)
    )
    method = hj.queue_similarity(PAIR, size=3)
    stage = hj.distillation_stage(network, network, method, optax.sgd(0.1))
    with jax.numpy_dtype_promotion("standard"):
        image = np.ones((2, 1, 1, 3), np.float32)
        image[1, ..., 0] = 5
        batch = {"image": image}
        state = stage.init(KEY, ours, theirs, batch)
        before = np.array(state.memory["queue"])
        assert not before.any()
        state, _ = stage.update(state, theirs, batch)
        filled = np.array(state.memory["queue"])
        np.testing.assert_allclose(np.linalg.norm(filled, axis=1), [1, 1, 0], rtol=1e-6)
        stage.evaluate(state, theirs, batch)
        bad = {"image": np.full_like(image, np.nan)}
        state, _ = stage.update(state, theirs, bad)
    np.testing.assert_array_equal(state.memory["queue"], filled)


def shapes(size):
    method = hj.queue_similarity(PAIR, size=size)
    features = [Features(hints={n: jnp.ones((2, 3))}) for n in PAIR]

    def init(n):
        data = n and Data(np.zeros(n, np.int32))
        made = jax.eval_shape(lambda key: method.init(key, *features, data), KEY)
        return made[1]["queue"].shape[0]

    return init


@pytest.mark.parametrize(
    ("n", "rows"), [(20, 16), (50, 32), (19999, 4096), (20000, 8192)]
)
def test_the_size_follows_the_training_set_as_in_lightly(n, rows):
    assert shapes(None)(n) == rows


def test_a_queue_is_smaller_than_the_training_set():
    assert shapes(20)(21) == 20
    with pytest.raises(ValueError, match="less than the 20 training examples, got 20"):
        shapes(20)(20)
    with pytest.raises(ValueError, match="size of the queue, or the training set"):
        shapes(None)(None)
