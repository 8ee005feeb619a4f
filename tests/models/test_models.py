"""Reference models: parameter counts, hint paths, and what the layers compute."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hintjax import models
from hintjax.models.blocks import batch_norm, conv
from hintjax.models.fitnets import max_pool
from hintjax.models.inverted import InvertedBottleneck
from hintjax.models.maxout import maxout

CIFAR, MNIST, DIGITS = (2, 32, 32, 3), (2, 28, 28, 1), (2, 8, 8, 1)


def trace(model, shape):
    """Shapes of the variables and, by path, of every layer; nothing is compiled."""
    collections = ["params", "batch_stats", "intermediates"]
    logits, variables = jax.eval_shape(
        lambda key, x: model.init_with_output(
            key, x, mutable=collections, capture_intermediates=True
        ),
        jax.random.key(0),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    layers = {
        "/".join(key.key for key in path[:-2]): leaf.shape[1:]
        for path, leaf in jax.tree.leaves_with_path(variables["intermediates"])
    }
    return logits, variables, layers


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def outputs(model, x, **kwargs):
    """Logits, layer outputs and variables; numpy draws the weights, to compile less."""
    _, shapes, _ = trace(model, x.shape)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if len(leaf.shape) < 2:
            one = path[-1].key in ("scale", "var")
            return np.full(leaf.shape, float(one), np.float32)
        std = math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    variables = {
        name: jax.tree.map_with_path(draw, shapes[name])
        for name in ("params", "batch_stats")
        if name in shapes
    }
    logits, state = jax.jit(
        lambda variables, x: model.apply(
            variables,
            x,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
            **kwargs,
        )
    )(variables, x)
    layers = {
        "/".join(key.key for key in path[:-2]): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state["intermediates"])
    }
    return logits, layers, variables


def images(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


# --- parameter counts


@pytest.mark.quick
def test_the_main_jobs_models_have_their_exact_sizes():
    _, student, _ = trace(models.plain_thin(classes=10), DIGITS)
    _, teacher, _ = trace(models.plain_wide(classes=10), DIGITS)
    assert count(student["params"]) == 11_266
    assert count(teacher["params"]) == 112_714


@pytest.mark.parametrize(
    ("factory", "millions"),
    [
        (models.resnet20, 0.278),
        (models.resnet32, 0.473),
        (models.resnet56, 0.862),
        (models.resnet110, 1.737),
        (models.resnet8x4, 1.234),
        (models.resnet32x4, 7.434),
        (models.wrn_16_2, 0.703),
        (models.wrn_40_1, 0.570),
        (models.wrn_40_2, 2.255),
    ],
)
def test_counts_of_the_crd_benchmark(factory, millions):
    logits, variables, _ = trace(factory(classes=100), CIFAR)
    assert logits.shape == (2, 100)
    assert round(count(variables["params"]) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("factory", "millions", "conv_millions", "paper_2_piece_millions"),
    [
        (models.fitnet1, 0.35, 0.18, 0.250),
        (models.fitnet2, 1.06, 0.73, 0.862),
        (models.fitnet3, 1.70, 1.37, None),
        (models.fitnet4, 2.74, 2.41, 2.5),
        (models.maxout_cifar, 16.25, 4.24, 9.0),
    ],
)
def test_counts_of_the_maxout_networks(
    factory, millions, conv_millions, paper_2_piece_millions
):
    model = factory(classes=10)
    _, variables, _ = trace(model, CIFAR)
    params = variables["params"]
    kernels = [params[name]["conv"]["kernel"] for name in params if "conv" in name]
    assert round(count(params) / 1e6, 2) == millions
    assert round(count(kernels) / 1e6, 2) == conv_millions
    if paper_2_piece_millions:
        _, variables, _ = trace(model.clone(hidden_pieces=2), CIFAR)
        measured = count(variables["params"]) / 1e6
        assert measured == pytest.approx(paper_2_piece_millions, rel=0.02)


@pytest.mark.parametrize(
    ("factory", "kernels_of_the_paper"),
    [(models.fitnet_mnist, 30_000), (models.maxout_mnist, 361_000)],
)
def test_counts_of_the_mnist_networks(factory, kernels_of_the_paper):
    _, variables, _ = trace(factory(classes=10), MNIST)
    kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
    assert count(kernels) == pytest.approx(kernels_of_the_paper, rel=0.002)


# --- hint paths


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (models.resnet20(classes=10), (16, 16, 32, 64)),
        (models.resnet8x4(classes=10), (32, 64, 128, 256)),
        (models.wrn_16_2(classes=10), (16, 32, 64, 128)),
    ],
)
def test_residual_networks_have_the_attachment_points_f0_to_f4(model, channels):
    logits, variables, layers = trace(model, CIFAR)
    sides = {"stem": 32, "group1": 32, "group2": 16, "group3": 8}
    for (path, side), features in zip(sides.items(), channels, strict=True):
        assert layers[path] == (side, side, features)
    assert layers["pool"] == (channels[-1],)
    assert layers["classifier"] == logits.shape[1:] == (10,)
    for group, path in model.preactivations.items():
        assert layers[path] == layers[group]
    for group, path in model.norms.items():
        assert layers[path] == layers[group]
    assert list(model.norms) == list(model.preactivations) == list(sides)[1:]
    assert set(variables["params"]) >= {"stem", "group1", "group3", "classifier"}


@pytest.mark.quick
def test_plain_models_name_every_block_and_pool():
    _, _, student = trace(models.plain_thin(classes=10), DIGITS)
    assert {path for path in student if "/" not in path} == {
        *(f"conv{number}" for number in range(1, 21)),
        "pool",
        "classifier",
        "",
    }
    assert student["conv10"] == student["conv10/conv"] == (8, 8, 8)
    _, _, teacher = trace(models.plain_wide(classes=10), DIGITS)
    shapes = {path: shape for path, shape in teacher.items() if "/" not in path}
    assert shapes == {
        "conv1": (8, 8, 64),
        "conv2": (8, 8, 64),
        "maxpool2": (4, 4, 64),
        "conv3": (4, 4, 128),
        "pool": (128,),
        "classifier": (10,),
        "": (10,),
    }


@pytest.mark.parametrize(
    ("student", "guided", "teacher", "shape", "maps"),
    [
        (models.fitnet1, "conv6", models.maxout_cifar, CIFAR, (8, 7)),
        (models.fitnet2, "conv6", models.maxout_cifar, CIFAR, (8, 7)),
        (models.fitnet3, "conv8", models.maxout_cifar, CIFAR, (8, 7)),
        (models.fitnet4, "conv11", models.maxout_cifar, CIFAR, (8, 7)),
        (models.fitnet_mnist, "conv4", models.maxout_mnist, MNIST, (4, 4)),
    ],
)
def test_the_pairs_of_the_paper_exist(student, guided, teacher, shape, maps):
    _, _, guided_layers = trace(student(classes=10), shape)
    _, _, hint_layers = trace(teacher(classes=10), shape)
    assert guided_layers[guided][:2] == (maps[0], maps[0])
    assert hint_layers["conv2"][:2] == (maps[1], maps[1])
    assert guided_layers[f"{guided}/maxout"][0] > guided_layers[guided][0]
    features = guided_layers[guided][-1]
    assert guided_layers[f"{guided}/conv"][-1] == 2 * features


@pytest.mark.quick
def test_every_factory_takes_classes_and_the_module_takes_train():
    factories = [name for name in models.__all__ if name == name.lower()]
    assert len(factories) == 66
    for name in factories:
        factory = getattr(models, name)
        model = factory(classes=7)
        assert not getattr(model, "has_logits", True) or model.classes == 7
        # "package.module:factory" must find the module, not a function of that name.
        home = importlib.import_module(factory.__module__)
        assert getattr(home, name) is factory


def test_a_strided_stem_halves_the_maps_of_a_resnet():
    published = trace(models.resnet8(10), CIFAR)
    halved = trace(models.resnet8(10).clone(stride=2), CIFAR)
    assert count(halved[1]["params"]) == count(published[1]["params"])
    for group in ("group1", "group2", "group3"):
        h, w, channels = published[2][group]
        assert halved[2][group] == (h // 2, w // 2, channels)


# --- what the layers compute


@pytest.mark.quick
def test_strided_convolutions_are_padded_like_torch():
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype(np.float32)
    logits = {}
    for kernel in (3, 1):
        layer = conv(4, kernel=kernel, stride=2, name="layer")
        y, variables = layer.init_with_output(jax.random.key(0), x)
        weights, side = np.asarray(variables["params"]["kernel"]), kernel // 2
        padded = np.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, (kernel, kernel), axis=(1, 2)
        )
        expected = np.einsum("bhwcij,ijcf->bhwf", windows[:, ::2, ::2], weights)
        assert y.shape == (1, 3, 3, 4)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        logits[kernel] = variables
    same = nn.Conv(4, (3, 3), strides=(2, 2), padding="SAME", use_bias=False)
    padded_by_torch = conv(4, stride=2, name="layer").apply(logits[3], x)
    assert np.abs(same.apply(logits[3], x) - padded_by_torch).max() > 0.1


@pytest.mark.parametrize(
    ("sizes", "strided"),
    [
        ({}, "depthwise"),
        ({"start_kernel": 3}, "depthwise"),
        ({"start_kernel": 3, "kernel": 0}, "start"),
        ({"kernel": 0, "expand_kernel": 3}, "expand"),
        ({"kernel": 0, "hidden": 4}, "expand"),
    ],
)
def test_one_layer_of_an_inverted_bottleneck_has_the_stride(sizes, strided):
    model = InvertedBottleneck(features=6, stride=2, **({"hidden": 8} | sizes))
    maps, _, layers = trace(model, (2, 8, 8, 4))
    assert maps.shape == (2, 4, 4, 6)
    order = [name for name in ("start", "expand", "depthwise") if name in layers]
    at = order.index(strided)
    for number, name in enumerate(order):
        assert layers[name][0] == (8 if number < at else 4)


def test_residual_convolutions_start_with_he_fan_out():
    _, variables = conv(64, name="layer").init_with_output(
        jax.random.key(0), jnp.zeros((1, 4, 4, 16))
    )
    std = np.std(variables["params"]["kernel"])
    assert std == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)


@pytest.mark.quick
def test_batch_norm_has_torchs_constants_and_an_exact_variance():
    x = 1000 + np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    layer = batch_norm(True, name="norm")
    y, variables = layer.init_with_output(
        jax.random.key(0), x, mutable=["params", "batch_stats"]
    )
    wide = x.astype(np.float64)
    scale = np.sqrt(wide.var(axis=0) + 1e-5)
    np.testing.assert_allclose(y, (wide - wide.mean(axis=0)) / scale, atol=1e-3)
    _, moved = layer.apply(variables, x, mutable=["batch_stats"])
    mean = np.asarray(moved["batch_stats"]["mean"])
    np.testing.assert_allclose(mean, 0.1 * wide.mean(axis=0), rtol=1e-5)


@pytest.mark.quick
def test_maxout_takes_the_largest_piece_of_each_unit():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 12)).astype(np.float32)
    expected = np.stack([x[..., :4], x[..., 4:8], x[..., 8:]]).max(axis=0)
    np.testing.assert_array_equal(maxout(jnp.asarray(x), 3), expected)
    with pytest.raises(ValueError, match=r"maxout: .*\(2, 3, 3, 12\) and 5 pieces"):
        maxout(jnp.asarray(x), 5)


def test_max_pool_covers_the_last_rows_and_columns():
    x = -np.arange(1.0, 26.0, dtype=np.float32)[::-1].reshape(1, 5, 5, 1)
    y = max_pool(jnp.asarray(x), window=2, stride=2)[0, :, :, 0]
    padded = np.pad(x[0, :, :, 0], ((0, 1), (0, 1)), constant_values=-np.inf)
    expected = padded.reshape(3, 2, 3, 2).max(axis=(1, 3))
    np.testing.assert_array_equal(y, expected)
    assert max_pool(jnp.asarray(x), window=8, stride=1).shape == (1, 1, 1, 1)


def test_the_initializer_of_fitnets_is_symmetric_and_small():
    kernel = models.fitnet1(classes=10).kernel_init(jax.random.key(0), (1000,))
    assert np.abs(kernel).max() <= 0.005
    assert np.abs(kernel).max() > 0.0049
    assert abs(np.mean(kernel)) < 0.0005


@pytest.mark.quick
def test_plain_models_pass_kernel_init_to_every_convolution():
    init = nn.initializers.constant(3.0)
    model = models.plain_thin(classes=10, depth=2, kernel_init=init)
    params = model.init(jax.random.key(0), images(*DIGITS))["params"]
    for name in ("conv1", "conv2"):
        assert (params[name]["conv"]["kernel"] == 3.0).all()
    wide = models.plain_wide(classes=10, kernel_init=init)
    assert wide.kernel_init is init


# --- one forward pass of each family


@pytest.mark.quick
def test_plain_hints_come_after_the_relu():
    model = models.plain_thin(classes=10, depth=3)
    x = images(*DIGITS)
    logits, layers, _ = outputs(model, x)
    assert np.isfinite(logits).all()
    before, after = layers["conv2/conv"], layers["conv2"]
    assert before.min() < 0
    np.testing.assert_array_equal(after, np.maximum(before, 0))
    np.testing.assert_allclose(
        layers["pool"], layers["conv3"].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6
    )


def test_maxout_forward():
    x = images(*DIGITS)
    logits, layers, _ = outputs(models.fitnet1(classes=10), x)
    assert np.isfinite(logits).all()
    pieces = np.split(layers["conv3/conv"], 2, axis=-1)
    np.testing.assert_array_equal(layers["conv3/maxout"], np.maximum(*pieces))
    pooled = layers["conv3/maxout"].reshape(2, 4, 2, 4, 2, 16).max(axis=(2, 4))
    np.testing.assert_array_equal(layers["conv3"], pooled)


def test_resnet_forward_and_its_preactivations():
    model = models.resnet8(classes=10)
    x = images(4, 8, 8, 3)
    logits, layers, variables = outputs(model, x, train=True)
    assert np.isfinite(logits).all()
    for group, path in model.preactivations.items():
        assert layers[path].min() < 0
        np.testing.assert_array_equal(layers[group], np.maximum(layers[path], 0))
    assert layers["stem"].min() == 0
    block = "group2/block1"
    kernel = variables["params"]["group2"]["block1"]["shortcut_conv"]["kernel"]
    projected = layers["group1"][:, ::2, ::2] @ kernel[0, 0]
    np.testing.assert_allclose(layers[f"{block}/shortcut_conv"], projected, atol=1e-4)
    added = layers[f"{block}/norm2"] + layers[f"{block}/shortcut_norm"]
    np.testing.assert_allclose(layers[f"{block}/sum"], added, atol=1e-5)


def test_wrn_forward_and_its_preactivations():
    model = models.WideResNet(10, 1, classes=10)
    x = images(4, 8, 8, 3)
    logits, layers, variables = outputs(model, x, train=True)
    assert np.isfinite(logits).all()
    assert layers["group3"].min() < 0
    block = "group2/block1"
    kernel = variables["params"]["group2"]["block1"]["shortcut"]["kernel"]
    active = np.maximum(layers[f"{block}/norm1"], 0)
    projected = active[:, ::2, ::2] @ kernel[0, 0]
    np.testing.assert_allclose(layers[f"{block}/shortcut"], projected, atol=1e-4)
    added = layers[f"{block}/conv2"] + layers[f"{block}/shortcut"]
    np.testing.assert_allclose(layers[block], added, atol=1e-5)
    last = np.maximum(layers["norm"], 0).mean(axis=(1, 2))
    np.testing.assert_allclose(layers["pool"], last, rtol=1e-4, atol=1e-5)
    for group, path in model.preactivations.items():
        normalized = layers[group] - layers[group].mean(axis=(0, 1, 2))
        normalized /= np.sqrt(layers[group].var(axis=(0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(layers[path], normalized, atol=1e-4)


# --- errors


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            models.ResNet(21, (16, 16, 32, 64), 10),
            CIFAR,
            r"depth to be 6n \+ 2 .* got 21",
        ),
        (models.WideResNet(20, 1, 10), CIFAR, r"depth to be 6n \+ 4 .* got 20"),
        (models.PlainCNN((8, 8), 10, pools=(0, 3)), DIGITS, r"1 to 2, got \[0, 3\]"),
        (models.fitnet_mnist(10), (2, 4, 4, 1), "conv1: .* 5 pixels per side, got 4x4"),
    ],
)
def test_impossible_architectures_say_what_to_do(model, shape, message):
    with pytest.raises(ValueError, match=message):
        trace(model, shape)
