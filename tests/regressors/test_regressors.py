"""Regressors: sized from two shapes, one example at a time, as published."""

from functools import partial

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import regressors
from hintjax.losses import hint_loss

KEY = jax.random.key(0)

# One of every kind: sizing, guided shape, hint shape.
KINDS = {
    "identity": (regressors.identity, (5, 4, 3), (5, 4, 3)),
    "linear vectors": (regressors.linear, (6,), (4,)),
    "linear tokens": (regressors.linear, (5, 6), (5, 4)),
    "linear maps": (regressors.linear, (5, 4, 6), (5, 4, 3)),
    "mlp": (partial(regressors.mlp, hidden=7), (5, 6), (5, 4)),
    "conv same": (regressors.conv, (4, 4, 3), (4, 4, 5)),
    "conv down": (regressors.conv, (6, 4, 3), (3, 2, 5)),
    "conv valid": (regressors.conv, (7, 5, 3), (5, 4, 2)),
    "conv up": (regressors.conv, (3, 2, 4), (6, 4, 3)),
    "conv mixed": (regressors.conv, (6, 3, 4), (3, 6, 2)),
    "maxout": (partial(regressors.valid_conv, pieces=2), (6, 5, 3), (4, 4, 2)),
    "fit": (regressors.fit, (6, 5, 3), (2, 10, 4)),
    "resampled maps": (regressors.resampled, (6, 3, 2), (3, 5, 4)),
    "resampled tokens": (partial(regressors.resampled, keep=1), (17, 2), (10, 4)),
}


def built(sizing, student, teacher, batch=4):
    """A regressor, and variables drawn by numpy: to compile `init` takes longer."""
    module = sizing(student, teacher)
    shapes = jax.eval_shape(
        lambda key: regressors.init(module, key, (batch, *student)), KEY
    )
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.array(generator.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
        return jnp.array(generator.normal(size=leaf.shape), leaf.dtype)

    return module, *jax.tree_util.tree_map_with_path(draw, shapes)


def features(shape, seed=1):
    """Numpy, since every small operation of jax is compiled once per shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(module, params, state, x, train=False):
    return regressors.apply(module, params, state, jnp.asarray(x), train)[0]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    sizing, student, teacher = KINDS[request.param]
    module, params, state = built(sizing, student, teacher)
    apply = jax.jit(partial(run, module, params, state))
    return (lambda x: np.asarray(apply(x))), student, teacher


# What every regressor owes


BATCH = 7  # not the 4 examples of the initialization


@pytest.mark.quick
def test_any_batch_size_gives_the_shape_of_the_hint(kind):
    apply, student, teacher = kind
    assert apply(features((BATCH, *student))).shape == (BATCH, *teacher)


def test_a_permuted_batch_gives_the_permuted_output(kind):
    apply, student, _ = kind
    x, order = features((BATCH, *student)), [2, 6, 0, 3, 1, 5, 4]
    np.testing.assert_allclose(apply(x[order]), apply(x)[order], atol=1e-6)


def test_examples_do_not_see_each_other(kind):
    apply, student, _ = kind
    x = features((BATCH, *student))
    before = apply(x)
    x[0] += 1
    np.testing.assert_array_equal(apply(x)[1:], before[1:])
    assert not np.allclose(apply(x)[0], before[0])


@pytest.mark.parametrize("name", ["linear tokens", "mlp", "conv down", "conv up"])
def test_batch_norm_is_equivariant_too_and_alone_couples_only_while_training(name):
    sizing, student, teacher = KINDS[name]
    module, params, state = built(partial(sizing, batch_norm=True), student, teacher)
    x, order = features((4, *student)), [2, 0, 3, 1]
    other = x.copy()
    other[0] += 1
    for train in (False, True):
        apply = jax.jit(partial(run, module, params, state, train=train))
        y = np.asarray(apply(x))
        np.testing.assert_allclose(apply(x[order]), y[order], atol=1e-5)
        assert np.array_equal(apply(other)[1:], y[1:]) == (not train)


# Sizes

MAP = st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 3))


@pytest.mark.quick
@hypothesis.settings(max_examples=60)
@hypothesis.given(student=MAP, teacher=MAP)
def test_conv_fits_any_two_maps(student, teacher):
    module = regressors.conv(student, teacher)
    x = jax.ShapeDtypeStruct((2, *student), jnp.float32)
    y, _ = jax.eval_shape(module.init_with_output, KEY, x)
    assert y.shape == (2, *teacher)


@pytest.mark.quick
@hypothesis.settings(max_examples=30)
@hypothesis.given(student=MAP, teacher=MAP)
def test_valid_conv_has_the_kernel_of_fitnets(student, teacher):
    """Its parameters are those that the paper counts: k1 k2 O_h O_g."""
    (h, w, c), (p, q, o) = student, teacher
    hypothesis.assume(p <= h and q <= w)
    module = regressors.valid_conv(student, teacher)
    y, variables = jax.eval_shape(
        module.init_with_output, KEY, jax.ShapeDtypeStruct((2, *student), jnp.float32)
    )
    assert y.shape == (2, *teacher)
    kernel = variables["params"]["layers_0"]["kernel"]
    assert kernel.shape == (h - p + 1, w - q + 1, c, o)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        ((8, 8), (8, 8), [("Conv", (1, 1), (1, 1))]),
        ((8, 8), (4, 4), [("Conv", (3, 3), (2, 2))]),
        ((8, 8), (2, 2), [("Conv", (7, 7), (4, 4))]),
        ((8, 8), (5, 5), [("Conv", (4, 4), (1, 1))]),
        ((4, 4), (8, 8), [("ConvTranspose", (4, 4), (2, 2))]),
        ((3, 3), (9, 9), [("ConvTranspose", (5, 5), (3, 3))]),
        ((5, 5), (8, 8), [("ConvTranspose", (4, 4), (1, 1))]),
        ((8, 6), (4, 6), [("Conv", (3, 1), (2, 1))]),
        ((8, 7), (4, 5), [("Conv", (3, 3), (2, 1))]),
        (
            (4, 6),
            (8, 6),
            [("Conv", (1, 1), (1, 1)), ("ConvTranspose", (4, 1), (2, 1))],
        ),
        (
            (8, 4),
            (4, 8),
            [("Conv", (3, 1), (2, 1)), ("ConvTranspose", (1, 4), (1, 2))],
        ),
    ],
)
def test_conv_is_sized_axis_by_axis_as_documented(student, teacher, layers):
    module = regressors.conv((*student, 3), (*teacher, 5))
    got = [(type(x).__name__, x.kernel_size, x.strides) for x in module.layers]
    assert got == layers
    assert all(layer.features == 5 for layer in module.layers)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((6, 6), (3, 3)), ((9, 6), (3, 2)), ((7, 6), (4, 5)), ((3, 2), (6, 6))]
    + [((4, 5), (7, 6)), ((6, 3), (3, 6))],
)
def test_every_position_is_used_and_predicted(student, teacher):
    module = regressors.conv((*student, 1), (*teacher, 1))
    x = np.ones((1, *student, 1), np.float32)
    params = jax.eval_shape(module.init, KEY, x)["params"]
    ones = {
        name: {"kernel": np.ones(p["kernel"].shape), "bias": np.zeros(1)}
        for name, p in params.items()
    }

    def total(x):
        y = run(module, ones, {}, x)
        return y.sum(), y

    used, predicted = jax.jit(jax.grad(total, has_aux=True))(x)
    assert (np.asarray(used) > 0).all()
    assert (np.asarray(predicted) > 0).all()


@pytest.mark.quick
def test_fit_chooses_by_rank():
    assert isinstance(regressors.fit((8, 8, 3), (4, 4, 5)).layers[0], nn.Conv)
    assert isinstance(regressors.fit((8, 3), (8, 5)).layers[0], nn.Dense)
    assert isinstance(regressors.fit((3,), (5,)).layers[0], nn.Dense)


# Mathematics


def test_valid_conv_is_a_sum_over_the_window():
    module, params, state = built(regressors.valid_conv, (5, 4, 2), (3, 3, 3))
    x = features((4, 5, 4, 2))
    kernel, bias = params["layers_0"]["kernel"], params["layers_0"]["bias"]
    want = np.zeros((4, 3, 3, 3))
    for i in range(3):
        for j in range(3):
            window = np.float64(x[:, i : i + 3, j : j + 2])
            want[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel) + bias
    np.testing.assert_allclose(run(module, params, state, x), want, atol=1e-5)


def test_mlp_has_one_hidden_layer_with_relu():
    module, params, state = built(partial(regressors.mlp, hidden=7), (5, 6), (5, 4))
    layers = jax.tree.leaves(params, is_leaf=lambda tree: "kernel" in tree)
    first, second = sorted(layers, key=lambda layer: layer["kernel"].shape[0])
    assert first["kernel"].shape == (6, 7)
    assert second["kernel"].shape == (7, 4)
    x = np.float64(features((4, 5, 6)))
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    want = hidden @ second["kernel"] + second["bias"]
    got = run(module, params, state, np.float32(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_maxout_takes_the_largest_of_its_pieces_before_the_activation():
    sizing = partial(regressors.linear, pieces=3, activation=jnp.tanh)
    module, params, state = built(sizing, (6,), (4,))
    kernel, bias = params["layers_0"]["kernel"], params["layers_0"]["bias"]
    assert kernel.shape == (6, 12)
    x = features((5, 6))
    want = np.tanh((np.float64(x) @ kernel + bias).reshape(5, 4, 3).max(-1))
    np.testing.assert_allclose(run(module, params, state, x), want, atol=1e-5)


def test_batch_norm_stands_before_the_activation_and_survives_a_large_mean():
    sizing = partial(regressors.linear, batch_norm=True, activation=nn.relu)
    module, params, state = built(sizing, (3, 3, 2), (3, 3, 2))
    params["layers_0"] = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    scale, bias = params["BatchNorm_0"]["scale"], params["BatchNorm_0"]["bias"]
    x = 1000 + features((8, 3, 3, 2))
    y, moved = jax.jit(partial(regressors.apply, module, train=True))(
        params, state, x=x
    )
    wide = np.float64(x)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    want = np.maximum((wide - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
    np.testing.assert_allclose(y, want, atol=2e-3)
    old, new = (tree["batch_stats"]["BatchNorm_0"] for tree in (state, moved))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-4)


@pytest.mark.quick
def test_statistics_move_only_in_training():
    sizing = partial(regressors.conv, batch_norm=True)
    module, params, state = built(sizing, (4, 4, 2), (4, 4, 3))
    x = features((4, 4, 4, 2))
    _, kept = jax.jit(partial(regressors.apply, module, train=False))(
        params, state, x=x
    )
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    _, moved = jax.jit(partial(regressors.apply, module, train=True))(
        params, state, x=x
    )
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert not np.allclose(*map(jax.tree.leaves, (moved, state)))


@pytest.mark.parametrize(
    ("name", "train"),
    [("same_train", True), ("up2_train", True), ("down2_eval", False)],
)
def test_conv_is_convreg_of_the_crd_benchmark(golden, name, train):
    case = golden(f"hint/convreg_{name}")
    x, hint = case["in.f_s"], case["in.f_t"]
    sizing = partial(regressors.conv, batch_norm=True, activation=nn.relu)
    module, params, state = built(sizing, x.shape[1:], hint.shape[1:])
    given = {
        "layers_0": {
            "kernel": case["param.conv.weight"],
            "bias": case["param.conv.bias"],
        },
        "BatchNorm_0": {
            "scale": case["param.bn.weight"],
            "bias": case["param.bn.bias"],
        },
    }
    stats = {
        "mean": case["state.bn.running_mean"],
        "var": case["state.bn.running_var"],
    }
    same = (params, state), (given, {"batch_stats": {"BatchNorm_0": stats}})
    assert jax.tree.structure(same[0]) == jax.tree.structure(same[1])

    def loss(params, x):
        state = {"batch_stats": {"BatchNorm_0": stats}}
        y, state = regressors.apply(module, params, state, x, train)
        return hint_loss(y, hint).mean(), (y, state["batch_stats"]["BatchNorm_0"])

    derived = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, (y, moved)), (by_params, by_x) = derived(given, x)
    layer, norm = by_params["layers_0"], by_params["BatchNorm_0"]
    for key, got in {
        "out.loss": value,
        "out.regressed": y,
        "grad.in.f_s": by_x,
        "grad.param.conv.weight": layer["kernel"],
        "grad.param.conv.bias": layer["bias"],
        "grad.param.bn.weight": norm["scale"],
        "grad.param.bn.bias": norm["bias"],
    }.items():
        assert case.error(key, got) < 1e-5, key
    if not train:
        jax.tree.map(np.testing.assert_array_equal, moved, stats)
        return
    assert case.error("state_out.bn.running_mean", moved["mean"]) < 1e-5
    # Torch keeps the unbiased variance, flax the biased one.
    count = y.size // y.shape[-1]
    unbiased = 0.9 * stats["var"]
    unbiased += (moved["var"] - unbiased) * count / (count - 1)
    assert case.error("state_out.bn.running_var", unbiased) < 1e-5


def test_the_bias_before_batch_norm_has_no_gradient():
    sizing = partial(regressors.conv, batch_norm=True)
    module, params, state = built(sizing, (4, 4, 2), (2, 2, 3))
    x = features((4, 4, 4, 2))
    loss = jax.jit(jax.grad(lambda p: (run(module, p, state, x, True) ** 3).sum()))
    gradient = loss(params)["layers_0"]
    scale = np.abs(gradient["kernel"]).max()
    assert np.abs(gradient["bias"]).max() < 1e-5 * scale


# Errors


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sizing", "student", "teacher", "message"),
    [
        (regressors.identity, (4, 4, 3), (4, 4, 5), "identity: expected equal shapes"),
        (regressors.linear, (4, 4, 3), (2, 2, 3), "linear: expected the same pos"),
        (regressors.mlp, (4, 3), (5, 3), "mlp: expected the same positions"),
        (regressors.conv, (4, 3), (4, 3), "conv: expected two maps"),
        (regressors.conv, (4, 4, 3), (3,), "conv: expected two maps"),
        (regressors.valid_conv, (3,), (3,), "valid_conv: expected two maps"),
        (regressors.valid_conv, (4, 4, 3), (4, 5, 3), "at least as large as the hint"),
        (regressors.fit, (4, 4, 3), (3,), "expected the same positions"),
        (regressors.fit, (16, 3), (4, 4, 3), "expected the same positions"),
    ],
)
def test_shapes_that_do_not_fit_are_both_named_with_a_way_out(
    sizing, student, teacher, message
):
    with pytest.raises(ValueError, match=message) as error:
        sizing(student, teacher)
    assert f"student {student} and teacher {teacher}. Use " in str(error.value)


def test_an_embedding_is_of_norm_one_and_averages_over_positions():
    head = regressors.Embedding(7)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    params, state = regressors.init(head, jax.random.key(0), tokens.shape)
    assert state == {}
    got = head.apply({"params": params}, tokens)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    pooled = head.apply({"params": params}, tokens.mean(1))
    np.testing.assert_allclose(got, pooled, rtol=1e-5)
    zero = jax.grad(lambda x: head.apply({"params": params}, x).sum())(0 * tokens)
    assert np.isfinite(zero).all()


# Tokens and grids


@pytest.mark.quick
def test_a_grid_has_its_tokens_in_reading_order_and_no_class_tokens():
    x = features((2, 2 + 3 * 4, 5))
    maps = regressors.to_grid(jnp.asarray(x), drop=2, size=(3, 4))
    assert maps.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(maps[:, 1, 2], x[:, 2 + 4 + 2])
    np.testing.assert_array_equal(regressors.to_tokens(maps), x[:, 2:])
    assert regressors.to_grid(jnp.zeros((2, 1 + 9, 5)), drop=1).shape == (2, 3, 3, 5)


@pytest.mark.quick
def test_resampled_tokens_are_averaged_on_their_grid_beside_the_kept_one():
    sizing = partial(regressors.resampled, keep=1, sizing=regressors.identity)
    x = jnp.asarray(features((2, 1 + 4 * 4, 3)))
    down = sizing((17, 3), (5, 3)).apply({}, x)
    blocks = x[:, 1:].reshape(2, 2, 2, 2, 2, 3).mean((2, 4)).reshape(2, 4, 3)
    np.testing.assert_array_equal(down[:, 0], x[:, 0])
    np.testing.assert_allclose(down[:, 1:], blocks, rtol=1e-5, atol=1e-6)
    up = sizing((5, 3), (17, 3)).apply({}, down)
    np.testing.assert_array_equal(up[:, 0], x[:, 0])
    again = np.repeat(np.repeat(blocks.reshape(2, 2, 2, 3), 2, 1), 2, 2)
    np.testing.assert_allclose(up[:, 1:], again.reshape(2, 16, 3), rtol=1e-5, atol=1e-6)


GRID = regressors.to_grid
SQUARE = "expected tokens on a square grid, got"


@pytest.mark.quick
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GRID(jnp.zeros((2, 65, 3))),
            f"to_grid: {SQUARE} 65 .*drop=1 leaves 8",
        ),
        (lambda: GRID(jnp.zeros((2, 66, 3)), drop=1), "66 .*drop=1. drop=2 leaves 8x8"),
        (lambda: GRID(jnp.zeros((2, 9, 3)), drop=9), "to_grid: .*drop from 0 to less"),
        (lambda: GRID(jnp.zeros((2, 9, 3)), drop=-1), "to_grid: .*9 tokens, got -1"),
        (
            lambda: GRID(jnp.zeros((2, 13, 3)), size=(3, 4)),
            "expected a grid of 3x4, got 13 tokens with drop=0. drop=1 leaves 3x4.",
        ),
        (lambda: GRID(jnp.zeros((2, 9, 3)), size=(3, 4)), "Pass the size of the grid"),
        (lambda: GRID(jnp.zeros((2, 3, 3, 4))), r"to_grid: expected tokens .*2, 3, 3"),
        (
            lambda: regressors.to_tokens(jnp.zeros((2, 9, 4))),
            "to_tokens: expected maps",
        ),
        (
            lambda: regressors.resampled((17, 3), (16, 3), keep=1),
            f"resampled: {SQUARE} 16 tokens with keep=1. keep=7 leaves 3x3",
        ),
        (
            lambda: regressors.resampled((18, 3), (16, 3)),
            f"resampled: {SQUARE} 18 tokens with keep=0. keep=2 leaves 4x4",
        ),
        (
            lambda: regressors.resampled((4, 4, 3), (16, 3)),
            "resampled: expected two maps .* View tokens as maps with hintjax.viewed",
        ),
        (
            lambda: regressors.resampled((4, 4, 3), (2, 2, 3), keep=1),
            "resampled: expected two maps .*keep=0.* with keep=1",
        ),
        (
            lambda: regressors.linear((17, 3), (16, 3)),
            "Use regressors.resampled between unequal numbers of tokens",
        ),
        (
            lambda: regressors.fit((17, 3), (4, 4, 3)),
            "Use hintjax.viewed with regressors.to_grid to view tokens as a map",
        ),
    ],
)
def test_tokens_that_form_no_grid_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hidden_layers_without_biases():
    module = regressors.mlp((4, 4, 3), (4, 4, 5), depth=2, bias=False)
    params, _ = regressors.init(module, jax.random.key(0), (1, 4, 4, 3))
    shapes = [x.shape for x in jax.tree.leaves(params)]
    assert shapes == [(3, 5), (5, 5), (5, 5)]
    params, _ = regressors.init(
        regressors.linear((3,), (5,), bias=False), jax.random.key(0), (1, 3)
    )
    assert [x.shape for x in jax.tree.leaves(params)] == [(3, 5)]


def test_a_bottleneck_is_between_maps_of_one_size():
    assert regressors.bottleneck((4, 4, 3), (4, 4, 8), factor=4).hidden == 2
    with pytest.raises(ValueError, match=r"regressors.bottleneck: .*same positions"):
        regressors.bottleneck((4, 4, 3), (2, 2, 8))
    with pytest.raises(ValueError, match=r"regressors.bottleneck: .*two maps"):
        regressors.bottleneck((3,), (8,))
