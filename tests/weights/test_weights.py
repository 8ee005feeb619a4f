"""Weights from torch: the file format, the maps of names, and equal outputs.

The files in `fixtures` are what `fixtures/make_torch_fixtures.py` wrote with torch.
"""

import ast
import json
import math
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import models, weights
from hintjax.models.imagenet import Bottleneck
from hintjax.weights.safetensors import DTYPES, read_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def outputs():
    with np.load(FIXTURES / "torch_outputs.npz") as file:
        return dict(file)


def shapes(model, sides):
    """Variables of a model for color images; nothing runs."""
    images = jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32)
    return jax.eval_shape(hj.linen(model).init, jax.random.key(0), images)


# The same numbers as torch


def resnet(block, widths):
    return models.ImageNetResNet((2, 1, 1, 1), 5, block, (4, *widths))


def vit(**kwargs):
    return models.VisionTransformer(4, 8, 2, 2, 5, **kwargs)


CASES = {
    "resnet_basic": (
        resnet(models.resnet.BasicBlock, (4, 6, 8, 10)),
        weights.RESNET,
    ),
    "resnet_bottleneck": (resnet(Bottleneck, (2, 3, 4, 5)), weights.RESNET),
    "timm_vit": (vit(), weights.TIMM_VIT),
    "timm_deit": (vit(distillation=True), weights.TIMM_DEIT),
    "torchvision_vit": (vit(), weights.TORCHVISION_VIT),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_torchs(name, outputs):
    model, names = CASES[name]
    network = hj.linen(model)
    images = jnp.asarray(outputs[f"{name}.images"].transpose(0, 2, 3, 1))
    like = shapes(model, images.shape[1:3])
    tensors = read_safetensors(FIXTURES / f"{name}.safetensors")
    params, state = weights.from_torch(tensors, names, like)
    hint = outputs.get(f"{name}.group2")
    wants = hj.Wants(output=True, hints=() if hint is None else ("group2",))
    apply = jax.jit(
        lambda *args: network.apply(*args, wants=wants, train=False, key=None)[0]
    )
    got = apply(params, state, images)
    want = outputs[f"{name}.logits"]
    assert want.std() > 0.1
    np.testing.assert_allclose(got.output, want, rtol=0, atol=1e-5)
    if hint is not None:
        hint = hint.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(got.hints["group2"], hint, rtol=0, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "model", "names"),
    [
        ("resnet18", models.imagenet_resnet18(1000), weights.RESNET),
        ("resnet50", models.imagenet_resnet50(1000), weights.RESNET),
        ("vit_tiny_patch16_224", models.vit_tiny(1000, patch=16), weights.TIMM_VIT),
    ],
)
def test_the_published_sizes_fit(name, model, names):
    full = json.loads((FIXTURES / "torch_names.json").read_text())[name]
    one = {False: np.float16(1), True: np.int64(1)}
    tensors = {
        key: np.broadcast_to(one[key.endswith("tracked")], shape)
        for key, shape in full.items()
    }
    like = shapes(model, (224, 224))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), like)
    got = weights.from_torch(tensors, names, half)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, like)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float16")}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("factory", "size"),
    [
        (models.imagenet_resnet18, 11_689_512),
        (models.imagenet_resnet34, 21_797_672),
        (models.imagenet_resnet50, 25_557_032),
    ],
)
def test_imagenet_resnets_have_torchvisions_sizes_and_the_houses_paths(factory, size):
    model = factory(classes=1000)
    network, images = hj.linen(model), jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    leaves = jax.tree.leaves(variables.params)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == size
    layers = {
        path: layer.shape[1:]
        for path, layer in network.layers(*variables, images).items()
    }
    bottleneck = factory is models.imagenet_resnet50
    wide = 4 if bottleneck else 1
    assert layers["stem"] == (32, 48, 64)
    assert layers["maxpool"] == (16, 24, 64)
    for number, features in enumerate((64, 128, 256, 512)):
        shape = (16 >> number, 24 >> number, wide * features)
        assert layers[f"group{number + 1}"] == shape
    for paths in (model.preactivations, model.norms):
        assert list(paths) == ["group1", "group2", "group3", "group4"]
        for group, path in paths.items():
            assert layers[path] == layers[group]
            *_, last = (one for one in layers if one.startswith(f"{group}/block"))
            assert path.split("/")[1] == last.split("/")[1]
    assert model.norms["group4"][-5:] == ("norm3" if bottleneck else "norm2")
    assert layers["pool"] == (wide * 512,)
    assert layers["classifier"] == (1000,)


@pytest.mark.quick
def test_widths_and_groups_of_an_imagenet_resnet_match():
    model = models.ImageNetResNet((1, 1), 5, widths=(4, 4, 8, 8))
    with pytest.raises(ValueError, match=r"ImageNetResNet: .* each of 2 groups, got"):
        shapes(model, (32, 32))


# Another resolution


def keys_kernel(t):
    """Cubic convolution for a = -1/2, one number at a time."""
    t, a = abs(t), -0.5
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def resampled_by_hand(line, new):
    old, out = len(line), []
    scale = max(1, old / new)
    for i in range(new):
        x = (i + 0.5) * old / new - 0.5
        weights_ = [keys_kernel((x - j) / scale) for j in range(old)]
        out.append(np.dot(weights_, line) / sum(weights_))
    return np.array(out)


@pytest.mark.quick
@pytest.mark.parametrize(("old", "grid"), [(3, (5, 7)), (7, (3, 3)), (4, (4, 9))])
@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_positions_are_resampled_as_bicubic_images(old, grid, class_tokens):
    random = np.random.default_rng(0)
    whole = random.normal(size=(1, class_tokens + old * old, 3)).astype(np.float32)
    got = weights.resample_positions(whole, grid, class_tokens)
    assert got.dtype == np.float32 and got.shape[1] == class_tokens + math.prod(grid)
    kept, patches = np.split(got[0], [class_tokens])
    np.testing.assert_array_equal(kept, whole[0, :class_tokens])
    square = whole[0, class_tokens:].reshape(old, old, 3)
    want = jax.image.resize(square, (*grid, 3), "cubic", antialias=True)
    np.testing.assert_allclose(patches.reshape(*grid, 3), want, rtol=0, atol=1e-5)
    rows = np.apply_along_axis(resampled_by_hand, 0, square, grid[0])
    both = np.apply_along_axis(resampled_by_hand, 1, rows, grid[1])
    np.testing.assert_allclose(patches.reshape(*grid, 3), both, rtol=0, atol=1e-6)


@pytest.mark.quick
def test_positions_on_their_own_grid_stay_as_they_are():
    whole = np.random.default_rng(0).normal(size=(1, 17, 3))
    np.testing.assert_allclose(weights.resample_positions(whole, (4, 4)), whole)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shape", "grid", "class_tokens"),
    [
        ((1, 17, 3), (4, 4), 2),
        ((17, 3), (4, 4), 1),
        ((2, 17, 3), (4, 4), 1),
        ((1, 1, 3), (4, 4), 1),
        ((1, 17, 3), (4, 0), 1),
    ],
)
def test_positions_that_are_no_square_grid_are_refused(shape, grid, class_tokens):
    with pytest.raises(ValueError, match="resample_positions: expected "):
        weights.resample_positions(np.ones(shape), grid, class_tokens)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "tensor", "tokens"),
    [
        ("timm_vit", "pos_embed", 1),
        ("timm_deit", "pos_embed", 2),
        ("torchvision_vit", "encoder.pos_embedding", 1),
    ],
)
def test_a_vit_of_another_resolution_has_resampled_positions(name, tensor, tokens):
    model, names = CASES[name]
    tensors = read_safetensors(FIXTURES / f"{name}.safetensors")
    got, same = (
        weights.from_torch(tensors, names, shapes(model, sides)).params
        for sides in ((20, 20), (12, 12))
    )
    want = weights.resample_positions(tensors[tensor], (5, 5), tokens)[0]
    np.testing.assert_array_equal(got["embed"]["positions"], want)
    np.testing.assert_array_equal(want[:tokens], tensors[tensor][0, :tokens])
    got["embed"].pop("positions"), same["embed"].pop("positions")
    jax.tree.map(np.testing.assert_array_equal, got, same)
    with pytest.raises(ValueError, match=rf"misshapen: {tensor} \(1, {9 + tokens}, 8"):
        weights.from_torch(tensors, names, shapes(model, (20, 12)))
    tensors[tensor] = weights.resample_positions(tensors[tensor], (5, 3), tokens)
    wide = weights.from_torch(tensors, names, shapes(model, (20, 12)))
    assert wide.params["embed"]["positions"].shape == (15 + tokens, 8)


# What does not match


@pytest.mark.quick
def test_everything_that_does_not_match_is_listed_at_once():
    model, names = CASES["timm_vit"]
    tensors = read_safetensors(FIXTURES / "timm_vit.safetensors")
    del tensors["blocks.1.attn.qkv.weight"], tensors["cls_token"]
    tensors["head.weight"] = np.ones((7, 8), np.float32)
    tensors["blocks.0.mlp.fc1.weight"] = np.ones((8, 32), np.float32)
    tensors["blocks.0.attn.qkv.bias"] = np.ones(23, np.float32)
    tensors["norm.bias"] = np.ones(8, np.int8)
    tensors["fc_norm.weight"] = tensors["reg_token"] = np.ones(8, np.float32)
    like = shapes(model, (12, 12))
    like.params["extra"] = {"kernel": np.ones((2, 2))}
    like.params["embed"]["positions"] = np.ones((10, 8, 1))
    with pytest.raises(ValueError) as error:
        weights.from_torch(tensors, names, like)
    assert str(error.value) == (
        "from_torch: expected tensors and model to match one to one, got "
        "missing: blocks.1.attn.qkv.weight, cls_token; "
        "left over: fc_norm.weight, reg_token; "
        "misshapen: blocks.0.attn.qkv.bias (23,) for (24,), "
        "blocks.0.mlp.fc1.weight (8, 32) for (32, 8), "
        "head.weight (7, 8) for (5, 8), "
        "params/embed/positions (10, 8, 1) for (tokens, width); "
        "no floats: norm.bias (int8); "
        "unnamed: params/extra/kernel. "
        "Build the model that the file was saved from, or use its map of names."
    )


@pytest.mark.quick
def test_a_leaf_of_another_number_of_tensors_is_misshapen():
    names = weights.Names((weights.TIMM_VIT.rules[2],))
    assert names.rules[0].torch == ("cls_token",)
    like = hj.Variables({"embed": {"tokens": np.ones((2, 8))}}, {})
    with pytest.raises(ValueError, match=r"misshapen: .*tokens \(2, 8\) for cls_token"):
        weights.from_torch({"cls_token": np.ones((1, 1, 8))}, names, like)


@pytest.mark.quick
def test_what_is_loaded_has_the_models_dtype_and_is_a_copy():
    names = weights.Names(weights.layer_norm("norm", "ln"))
    like = hj.Variables({"norm": {"scale": np.ones(64), "bias": np.ones(64)}}, {})
    like = jax.tree.map(np.float32, like)
    scale = np.arange(64, dtype=jnp.bfloat16)
    # Where jax would take a numpy array as it is.
    buffer = np.empty(64 * 4 + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    bias = buffer[start : start + 64 * 4].view(np.float32)
    bias[:] = np.arange(64)
    got = weights.from_torch({"ln.weight": scale, "ln.bias": bias}, names, like)
    assert got.params["norm"]["scale"].dtype == jnp.float32
    bias[:] = 0
    for leaf in got.params["norm"].values():
        np.testing.assert_array_equal(leaf, np.arange(64))


# The file format


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.quick
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read(tmp_path, name):
    want = np.array([[1, 0, 1], [0, 1, 1]]).astype(DTYPES[name])
    size = want.nbytes
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(name, (2, 3), (0, size)),
        "empty": entry(name, (0, 3), (size, size)),
        "scalar": entry(name, (), (size, size + want.itemsize)),
    }
    data = want.tobytes() + want[1, 1].tobytes()
    tensors = read_safetensors(write(tmp_path / "a.safetensors", header, data))
    assert list(tensors) == ["b", "empty", "scalar"]
    assert tensors["b"].dtype == np.dtype(DTYPES[name])
    np.testing.assert_array_equal(tensors["b"], want)
    assert tensors["empty"].shape == (0, 3)
    assert tensors["scalar"] == 1 and tensors["scalar"].shape == ()


@pytest.mark.quick
def test_bfloat16_has_the_upper_bits_of_float32(tmp_path):
    data = np.array([1.0, -3.140625, 2**100], np.float32)
    header = {"x": entry("BF16", (3,), (0, 6))}
    upper = (data.view(np.uint32) >> 16).astype("<u2").tobytes()
    got = read_safetensors(write(tmp_path / "a.safetensors", header, upper))["x"]
    np.testing.assert_array_equal(np.float32(got), data)


@pytest.mark.quick
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    text = json.dumps({"x": entry()}).encode().ljust(0x0280)
    path = write(tmp_path / "a.safetensors", text, bytes(8))
    assert path.read_bytes()[:2] == pickle.dumps(0, 2)[:2] == b"\x80\x02"
    np.testing.assert_array_equal(read_safetensors(path)["x"], [0, 0])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "tensors"])
def test_pickles_are_refused_by_content_and_by_name(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"x": 1}, 2))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", b"")
    else:
        write(path, {"x": entry()}, bytes(8))
        if name == "a.safetensors":
            assert list(read_safetensors(path)) == ["x"]
            return
    message = rf"{name}: expected a safetensors file, got a pickle.*torch\.save_file\("
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(path)
    code = str(error.value).partition("convert it: ")[2].removesuffix(".")
    first, second = code.split("; ")  # two statements that run where torch is
    ast.parse(f"{first}\n{second}")
    assert f"torch.load('{name}', map_location='cpu', weights_only=True)" in second


@pytest.mark.quick
@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"x": entry()}, 7, "expected 8 bytes of data, got 7. Fetch"),
        ({"x": entry()}, 9, "expected 8 bytes of data, got 9. Fetch"),
        (
            {"x": entry(), "y": entry(offsets=(4, 12))},
            12,
            "'y' .*'x' ends, at 8, got 4",
        ),
        (
            {"x": entry(), "y": entry(offsets=(9, 17))},
            17,
            "'y' .*'x' ends, at 8, got 9",
        ),
        ({"x": entry(offsets=(1, 9))}, 9, "'x' .* the header ends, at 0, got 1"),
        ({"x": entry(shape=(3,))}, 8, r"'x' to have 12 bytes \(F32 \[3\]\), got 8"),
        ({"x": entry(offsets=(8, 0))}, 8, "'x' to have 8 bytes .*, got -8"),
        ({"x": entry("F8_E4M3")}, 8, "'x' to be one of .*BF16.*, got F8_E4M3. Convert"),
        ({"x": entry(shape=(-2,))}, 8, "shape .* of 'x' .*>= 0.*, got .*-2"),
        ({"x": entry(shape=(2.0,))}, 8, "of 'x' .*, got .*2.0"),
        ({"x": entry(shape=(True, 2))}, 8, "of 'x' .*, got .*True"),
        ({"x": entry(offsets=(0, 4, 8))}, 8, "data_offsets of 'x' .*, got .*4, 8"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets of 'x'"),
        ({"x": 3}, 8, "data_offsets of 'x' .* got 3"),
        ([1], 0, "a JSON object .* got list"),
        (b'{"x": 1, "x": 2}', 0, "without repeated names, got 'x' twice"),
        (b'{"x": ', 0, "in JSON, .* got Expecting value"),
        (b'{"\xff": 1}', 0, "in JSON, .* got 'utf-8' codec"),
        (b"[" * 100_000, 0, "in JSON, .* got .*recursion"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, size, message):
    path = write(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(
        ValueError, match=f"read_safetensors: a.safetensors: .*{message}"
    ):
        read_safetensors(path)


@pytest.mark.quick
@pytest.mark.parametrize("kept", [0, 4, 8, 40])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path, kept):
    path = write(tmp_path / "a.safetensors", {"x": entry()}, bytes(8))
    path.write_bytes(path.read_bytes()[:kept])
    message = f"a header within the file, got one of .* in a file of {kept}. Fetch"
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)


@pytest.mark.quick
def test_a_header_of_endless_length_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(150_000_100)  # a hole: the disk is spared
    with pytest.raises(
        ValueError, match="header within the file, got one of 150000000"
    ):
        read_safetensors(path)
