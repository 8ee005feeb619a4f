"""Teachers from safetensors files of torch: loaded, judged, recorded, never trained."""

import dataclasses
import json
import runpy
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hintjax as hj
from hintjax import models
from hintjax.cli import main
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.setting import prepare, taught_by
from hintjax.experiments.teaching import check_teacher, teacher_variables
from hintjax.weights import read_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
FACTORIES = """
from flax import linen as nn
from hintjax import models, weights
from hintjax.models.imagenet import Bottleneck

def vit(classes):
    return models.VisionTransformer(4, 8, 2, 2, classes)

def deit(classes):
    return models.VisionTransformer(4, 8, 2, 2, classes, distillation=True)

def resnet(classes):
    widths = (4, 2, 3, 4, 5)
    return models.ImageNetResNet((2, 1, 1, 1), classes, Bottleneck, widths)

class Renamed(nn.Module):
    classes: int
    torch_names = weights.Names(weights.linear("first", "head"), ("[!h]*",))

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.classes, name="first")(x.mean((1, 2)) @ ones())

def dinov2(classes):
    return models.ImageTower(14, 8, 2, 2, 32, scaled=True)

def ones():
    import jax.numpy as jnp
    return jnp.ones((3, 8))
"""


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        shape = list(tensor.shape)
        kind = {"f4": "F32", "i8": "I64"}[tensor.dtype.str[1:]]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), end]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a run on 80 images with 5 classes, whose teacher is a file."""
    (tmp_path / "torch_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (80, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", image=image, label=np.arange(80) % 5)
    shutil.copy(FIXTURES / "timm_vit.safetensors", tmp_path / "vit.safetensors")
    return {
        "dataset": str(tmp_path / "images.npz"),
        "teacher": "torch_models:vit",
        "student": "torch_models:vit",
        "weights": str(tmp_path / "vit.safetensors"),
    }


def words(options, run_dir, *rest):
    pairs = ((f"--{name}", value) for name, value in options.items())
    common = ("--epochs", "2", "--teacher-at-least", "0", "--devices", "1")
    chosen = [word for pair in pairs for word in pair]
    return ["distill", *chosen, *common, "--run-dir", str(run_dir), *rest]


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "teacher", "head"),
    [
        ("timm_vit", "vit", "head"),
        ("torchvision_vit", "vit", "heads.head"),
        ("timm_deit", "deit", "head"),
        ("resnet_bottleneck", "resnet", "fc"),
        ("timm_vit", "Renamed", "head"),
    ],
)
def test_a_file_is_loaded_into_the_network_of_the_factory(
    name, teacher, head, options, tmp_path
):
    path = FIXTURES / f"{name}.safetensors"
    given = options | {"weights": str(path), "teacher": f"torch_models:{teacher}"}
    setting = prepare(Config(**given, devices=1), teach=True)
    params, _ = teacher_variables(setting, tmp_path)
    kernel = params["first" if teacher == "Renamed" else "classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, read_safetensors(path)[f"{head}.weight"].T)
    assert setting.places.same_outputs
    assert not (tmp_path / "teacher").exists()  # nothing was trained


@pytest.mark.quick
def test_a_teacher_from_a_file_is_judged_on_the_validation_split(options, tmp_path):
    setting = prepare(Config(**options, devices=1), teach=True)
    variables = teacher_variables(setting, tmp_path)
    config = dataclasses.replace(setting.config, teacher_at_least=0.9)
    setting = setting._replace(config=config)
    with pytest.warns(UserWarning, match=r"torch_models:vit: .* less than 90 %"):
        found = check_teacher(setting, variables)
    assert 0 <= found <= 1


@pytest.mark.quick
def test_a_file_of_other_classes_gives_its_hints(options, tmp_path, capsys, unchecked):
    with np.load(options["dataset"]) as file:
        label = file["label"] % 3
        np.savez(tmp_path / "three.npz", image=file["image"], label=label)
    options["dataset"] = str(tmp_path / "three.npz")
    setting = prepare(Config(**options, devices=1), teach=True)
    assert setting.places.teacher["classifier"].shape == (1, 5)
    assert setting.places.student["classifier"].shape == (1, 3)
    error = refused(capsys, words(options, tmp_path / "run", "--method", "kd"))
    assert "with outputs (3,) of the student" in error
    assert "got outputs (5,) of torch_models:vit. A method of hints" in error


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "got missing: norm.bias. Build the model that the file was"),
        ("left over", "left over: extra"),
        ("misshapen", "misshapen: norm.bias (7,) for (8,)"),
        ("gone", "weights: expected a file"),
        ("pickle", "read_safetensors: vit.safetensors: expected a safetensors file"),
        ("another network", "from_torch: expected tensors and model to match one to"),
        ("a finished run", "expected a factory as teacher"),
        ("another digest", "vit.safetensors with the SHA-256 abc, got "),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence_before_anything_is_trained(
    change, sentence, options, tmp_path, capsys, unchecked
):
    path = Path(options["weights"])
    tensors = read_safetensors(path)
    match change:
        case "missing":
            del tensors["norm.bias"]
        case "left over":
            tensors["extra"] = np.ones(3, np.float32)
        case "misshapen":
            tensors["norm.bias"] = np.ones(7, np.float32)
        case "another network":
            options["teacher"] = "torch_models:resnet"
        case "a finished run":
            options["teacher"] = "runs/first"
        case "another digest":
            options["weights-sha256"] = "abc"
    write_safetensors(path, tensors)
    if change == "gone":
        path.unlink()
    if change == "pickle":
        path.write_bytes(b"\x80\x02pickled")
    error = refused(capsys, words(options, tmp_path / "run", "--method", "kd"))
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_run_records_its_file_and_resumes_only_with_it(options, tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(words(options, run_dir, "--method", "kd"))
    assert not (run_dir / "teacher").exists()
    config = configs.load(run_dir)
    assert config.weights == options["weights"]
    assert len(config.weights_sha256) == 64
    main(["resume", str(run_dir)])
    path = Path(options["weights"])
    tensors = {name: array + 1 for name, array in read_safetensors(path).items()}
    write_safetensors(path, tensors)
    capsys.readouterr()
    error = refused(capsys, ["resume", str(run_dir)])
    assert f"with the SHA-256 {config.weights_sha256}, got " in error
    assert "Restore the file" in error


# A foundation model as the teacher


@pytest.fixture
def features(options, tmp_path):
    """Options of a run on 28x28 images, whose teacher is a small DINOv2."""
    names = json.loads((FIXTURES / "teacher_names.json").read_text())["timm_dinov2"]
    drawn = runpy.run_path(str(FIXTURES / "drawn.py"))["drawn"]
    write_safetensors(tmp_path / "dinov2.safetensors", drawn(names))
    return write_images(28, 3, tmp_path) | {
        "teacher": "torch_models:dinov2",
        "student": "hintjax.models:resnet8",
        "weights": str(tmp_path / "dinov2.safetensors"),
    }


def write_images(side, channels, folder):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (80, side, side, channels), dtype=np.uint8)
    path = folder / f"images{side}{channels}.npz"
    np.savez(path, image=image, label=np.arange(80) % 5)
    return {"dataset": str(path)}


def test_a_teacher_sees_gray_images_in_its_own_normalization(features, tmp_path):
    given = features | write_images(28, 1, tmp_path)
    setting = prepare(Config(**given, devices=1), teach=True)
    params, state = teacher_variables(setting, tmp_path)
    tower = models.ImageTower(14, 8, 2, 2, 32, scaled=True)

    @partial(jax.jit, static_argnums=0)
    def patches(network, images):
        wants = hj.Wants(hints=("embed/patches",))
        shown, _ = network.apply(params, state, images, wants=wants, train=False)
        return shown.hints["embed/patches"]

    pixels = setting.dataset.train.image[:2] / 255
    mean, std = setting.dataset.standardize
    got = patches(taught_by(setting), jnp.float32((pixels - mean) / std))
    mean, std = np.array(tower.image_normalization)
    want = patches(hj.linen(tower), jnp.float32((pixels - mean) / std))
    assert got.shape == (2, 2, 2, 8)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.quick
def test_a_teacher_of_features_gives_hints_and_is_not_judged(
    features, tmp_path, capsys
):
    setting = prepare(Config(**features, devices=1), teach=True)
    assert setting.places.teacher["block2"].shape == (1, 5, 8)
    assert setting.places.class_tokens == (0, 1)
    assert not setting.places.same_outputs
    assert check_teacher(setting, teacher_variables(setting, tmp_path)) is None
    assert "is not judged" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no weights", "logits, which labels can train, got features alone. As a"),
        ("a student", "torch_models:dinov2 to make a model with logits"),
        ("size", "sides are multiples of the patch, 14, got 27x27. Resize the images"),
        ("channels", "renormalized: expected images of 1 or 3 channels, got 4."),
    ],
)
def test_a_teacher_of_features_that_cannot_teach_is_one_sentence(
    change, sentence, features, tmp_path, capsys, unchecked
):
    match change:
        case "no weights":
            del features["weights"]
        case "a student":
            features["student"] = features["teacher"]
        case "size":
            features |= write_images(27, 3, tmp_path)
        case "channels":
            features |= write_images(28, 4, tmp_path)
    error = refused(capsys, words(features, tmp_path / "run", "--method", "at"))
    assert sentence in error and error.count("\n") == 1


@pytest.mark.quick
def test_without_labels_a_network_of_features_learns_from_another(features, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    given = features | {"dataset": str(tmp_path / "photos")}
    setting = prepare(
        Config(**(given | {"student": given["teacher"]}), devices=1), teach=True
    )
    assert setting.places.same_outputs
    setting = prepare(Config(**given, devices=1), teach=True)
    assert setting.places.student["classifier"].shape == (1, 8)
