"""Foundation models and mobile networks with the weights of torch: equal numbers.

`fixtures/make_teacher_fixtures.py` ran the libraries' own classes, made small. Weights
and images are drawn from their names, there and here.
"""

import functools
import json
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
from hintjax.models.tower import quick_gelu

FIXTURES = Path(__file__).parents[1] / "fixtures"
DRAWN = runpy.run_path(str(FIXTURES / "drawn.py"))
drawn, images = DRAWN["drawn"], DRAWN["images"]
NAMES = json.loads((FIXTURES / "teacher_names.json").read_text())


@pytest.fixture(scope="module")
def outputs():
    with np.load(FIXTURES / "teacher_outputs.npz") as file:
        return dict(file)


def dinov2(hidden=32, **kwargs):
    return models.ImageTower(14, 8, 2, 2, hidden, scaled=True, **kwargs)


def tower(**kwargs):
    return models.ImageTower(14, 8, 2, 2, 24, **kwargs)


def dinov3(**kwargs):
    return tower(registers=4, scaled=True, epsilon=1e-5, rotated=True, **kwargs)


MOBILENET = (
    (Mobile(16, 16, 3, 2, False, True), Mobile(16, 24, 3, 1, False, False)),
    (Mobile(24, 32, 5, 2, True, True), Mobile(24, 40, 3, 1, True, True)),
)
CONVNEXT = models.ConvNeXt((1, 2, 1, 1), (4, 6, 8, 10), 5)
LITE = models.EfficientNetLite(5, width=0.2, depth=0.5)
CASES = {
    "timm_lite": LITE,
    "lite_pytorch": LITE,
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


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
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
