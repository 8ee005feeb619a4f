"""Dense matching as a method: grids, standardized hints, the published code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import dense_matching, losses, regressors, viewed
from hintjax.method import Context
from hintjax.networks import Features

pytestmark = pytest.mark.usefixtures("strict")

KEY = jax.random.key(0)
CONTEXT = Context(KEY, jnp.int32(0), True)


def features(**shapes):
    generator = np.random.default_rng(0)
    return [
        Features(hints={n: jnp.array(generator.normal(size=shape), jnp.float32)})
        for n, shape in shapes.items()
    ]


def head(case, name):
    return {"kernel": case[f"{name}.weight"], "bias": case[f"{name}.bias"]}


# One program each: without it, every operation would be compiled by itself.
def begun(method, student, teacher):
    return jax.jit(lambda key: method.init(key, student, teacher, None))(KEY)


def applied(method, *arguments):
    return jax.jit(lambda *a: method.apply(*a, CONTEXT))(*arguments)


def gradients(method, params, memory, student, teacher):
    def run(params, student):
        values, _, _ = method.apply(params, memory, student, teacher, {}, CONTEXT)
        return values.mean()

    return jax.jit(jax.value_and_grad(run, (0, 1)))(params, student)


@pytest.mark.parametrize("sizes", ["linear_5x7_to_16x16", "mlp2_16x16_to_5x7"])
def test_the_method_is_lightlys_code(golden, sizes):
    case = golden(f"lightly_v2/{sizes}")
    name, linear = "student_projection_head.mlp", sizes.startswith("linear")
    mlp = partial(regressors.layer_norm_mlp, hidden=20)
    method = dense_matching(
        [("a", "x")], regressor=regressors.linear if linear else mlp
    )
    own = {"layers_0": head(case, f"param.{name}")} if linear else None
    if own is None:
        weight, bias = (case[f"param.{name}.1.{part}"] for part in ("weight", "bias"))
        hidden = {"layers_0": head(case, f"param.{name}.0")}
        hidden["layers_1"] = {"scale": weight, "bias": bias}
        own = {"layers_0": hidden, "layers_1": head(case, f"param.{name}.3")}
    params = {"a->x": {"regressor": own}}
    hint = jnp.array(np.concatenate([case["in.f_t.0"], case["in.f_t.1"]], -1))
    student = Features(hints={"a": case["in.f_s"]})
    teacher = Features(hints={"x": hint})
    made, memory = jax.eval_shape(lambda: method.init(KEY, student, teacher, None))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    value, grads = gradients(method, params, memory, student, teacher)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", grads[1].hints["a"]) < 1e-5
    last = grads[0]["a->x"]["regressor"]["layers_0" if linear else "layers_1"]
    name = f"grad.param.{name}" + ("" if linear else ".3")
    assert case.error(f"{name}.weight", last["kernel"]) < 1e-5
    assert case.error(f"{name}.bias", last["bias"]) < 1e-5


def test_standardized_hints_are_phi_s(golden):
    case = golden("phis/d48_sylvester4_x_paley12")
    mean, matrix = case["state.mean"], case["state.whiten"]
    transform = losses.Standardization(mean, matrix, jnp.array(np.linalg.inv(matrix)))
    method = dense_matching(
        [("a", "x")], standardization=[transform], regressor=regressors.identity
    )
    student = Features(hints={"a": case["in.f_s"]})
    teacher = Features(hints={"x": case["in.f_t"]})
    params, memory = begun(method, student, teacher)
    value, grads = gradients(method, params, memory, student, teacher)
    assert case.error("out.loss", value) < 1e-5
    assert case.error("grad.in.f_s", grads[1].hints["a"]) < 1e-5
    jax.tree.map(
        np.testing.assert_array_equal, memory["standardization"]["a->x"], transform
    )


def bilinear(x, size):
    """Torch's, in loops: half-pixel centers, no antialiasing."""
    h, w = x.shape[1:3]
    out = np.zeros((x.shape[0], *size, x.shape[3]))
    for i, j in np.ndindex(*size):
        y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
        z = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
        top, left = int(y), int(z)
        for a, b in np.ndindex(2, 2):
            share = (1 - abs(y - top - a)) * (1 - abs(z - left - b))
            place = min(top + a, h - 1), min(left + b, w - 1)
            out[:, i, j] += share * np.float64(x[:, *place])
    return out


@pytest.mark.parametrize(
    ("size", "want"), [(None, (3, 6)), (max, (4, 6)), (min, (3, 2))]
)
def test_maps_are_compared_on_the_grid_that_is_asked_for(size, want):
    student, teacher = features(a=(2, 4, 2, 3), x=(2, 3, 6, 3))
    asked = {} if size is None else {"size": size}
    method = dense_matching([("a", "x")], **asked)
    params, memory = begun(method, student, teacher)
    values, *_ = applied(method, params, memory, student, teacher, {})
    own = params["a->x"]["regressor"]["layers_0"]
    y = np.asarray(student.hints["a"]) @ np.asarray(own["kernel"])
    squares = np.square(bilinear(y, want) - bilinear(teacher.hints["x"], want))
    np.testing.assert_allclose(values, squares.mean((1, 2, 3)), rtol=1e-5)


def test_tokens_are_a_square_grid():
    student, teacher = features(a=(2, 2, 2, 3), x=(2, 16, 5))
    method = dense_matching([("a", "x")], resize=regressors.nearest_resize)
    params, memory = begun(method, student, teacher)
    got, *_ = applied(method, params, memory, student, teacher, {})
    grid = Features(hints={"x": teacher.hints["x"].reshape(2, 4, 4, 5)})
    want, *_ = applied(method, params, memory, student, grid, {})
    np.testing.assert_array_equal(got, want)
    dropped = viewed(method, teacher=partial(regressors.to_grid, drop=1))
    _, more = features(a=(2, 2, 2, 3), x=(2, 17, 5))
    values, *_ = applied(dropped, params, memory, student, more, {})
    assert values.shape == (2,)
    with pytest.raises(ValueError, match="dense_matching: expected tokens on a square"):
        method.init(KEY, student, more, None)


def test_as_many_tokens_stay_tokens_and_vectors_have_no_grid():
    for shape in (5,), ():
        student, teacher = features(a=(2, *shape, 3), x=(2, *shape, 4))
        method = dense_matching([("a", "x")])
        params, memory = begun(method, student, teacher)
        batch = {} if not shape else {"mask": np.arange(5) < np.array([[5], [2]])}
        masked = dense_matching([("a", "x")], padding="mask") if shape else method
        values, *_ = applied(masked, params, memory, student, teacher, batch)
        assert values.shape == (2,)


def test_layers_without_a_common_grid_are_refused():
    student, teacher = features(a=(2, 4, 4, 3), x=(2, 5))
    with pytest.raises(ValueError, match="dense_matching: .*same number of axes"):
        dense_matching([("a", "x")]).init(KEY, student, teacher, None)


@pytest.mark.usefixtures("unchecked")
def test_a_standardization_fits_its_pair():
    moments = losses.feature_moments(jnp.ones((3, 4)))
    transform = losses.channel_standardization(moments)
    with pytest.raises(ValueError, match="one for each pair, got 2 entries"):
        dense_matching([("a", "x")], standardization=[transform, transform])
    method = dense_matching([("a", "x")], standardization=[transform])
    student, teacher = features(a=(2, 3), x=(2, 5))
    with pytest.raises(ValueError, match="a->x for 5 channels, got 4"):
        method.init(KEY, student, teacher, None)
