"""Finished runs: their evaluation in batches that fit into memory."""

import numpy as np
import pytest

import hintjax as hj
from hintjax import data
from hintjax.experiments import explained, feature_maps, finished
from hintjax.experiments.config import Config
from hintjax.experiments.finished import evaluation_size, score
from hintjax.experiments.run import _validation
from hintjax.experiments.setting import batches_of, prepare
from hintjax.experiments.tasks import TASKS

pytestmark = pytest.mark.quick


def split(n, *shape):
    image = np.broadcast_to(np.uint8(0), (n, *shape))  # takes no memory
    return data.Split(image, np.zeros(n, np.int32))


@pytest.mark.parametrize(
    ("shape", "n", "batch_size", "size"),
    [
        ((8, 8, 1), 144, 16, 500),  # small images: as always
        ((8, 8, 1), 1, 1024, 500),
        ((32, 32, 3), 10_000, 64, 500),
        ((64, 64, 3), 10_000, 16, 125),
        ((64, 64, 3), 100, 16, 100),  # not more than there are
        ((256, 256, 3), 12, 2, 7),
        ((256, 256, 3), 12, 64, 12),
        ((256, 256, 3), 10_000, 64, 64),  # as a step of training
        ((256, 256, 3), 10_000, 1024, 500),
        ((4096, 4096, 3), 10_000, 1, 1),
    ],
)
def test_the_size_follows_images_split_and_batch(shape, n, batch_size, size):
    config = Config(batch_size=batch_size)
    assert evaluation_size(split(n, *shape), config) == size
    for parts in (2, 3, 8):
        shared = evaluation_size(split(n, *shape), config, parts)
        assert shared % parts == 0 and 0 <= shared - size < parts


def test_the_size_follows_the_micro_batches_of_training():
    config = Config(batch_size=64, accumulate=4)
    assert evaluation_size(split(100, 256, 256, 3), config) == 16


def large(tmp_path, **options):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (12, 256, 256, 3), dtype=np.uint8)
    path = tmp_path / "large.npz"
    np.savez(path, image=image, label=np.arange(12) % 2)
    return prepare(
        Config(dataset=str(path), method="backprop", batch_size=4, **options)
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_twelve_large_images_are_not_evaluated_as_five_hundred(devices, tmp_path):
    setting = large(tmp_path, devices=devices)
    for name, n in (("train", 9), ("validation", 1), ("test", 2)):
        one = getattr(setting.dataset, name)
        found = list(batches_of(setting, one))
        assert one.n == n and sum(int(batch["where"].sum()) for batch in found) == n
        assert {len(batch["image"]) for batch in found} <= {1, 2, 4, 7, 8}


def test_validation_batches_stay_on_the_device_only_as_far_as_they_fit(
    tmp_path, monkeypatch
):
    setting = large(tmp_path, devices=1)
    made = _validation(setting)
    assert made()[0]["image"] is made()[0]["image"]
    # One image of 192 KiB, which is four times as large as float32.
    monkeypatch.setattr("hintjax.experiments.run.ON_DEVICE", 4 * 196_608 - 1)
    made = _validation(setting)
    assert next(made())["image"] is not next(made())["image"]


def test_the_accuracy_does_not_depend_on_the_size_of_the_batches():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (30, 2, 2, 1), dtype=np.uint8)
    one = data.Split(image, np.arange(30, dtype=np.int32) % 4)
    scale = data.statistics(one)

    def apply(params, state, x, train, key):
        return x.reshape(len(x), 4), {}, state

    network, nothing = hj.function(apply), hj.Variables({}, {})
    task = TASKS["classification"]
    right = score(network, nothing, one, scale, 500, task)
    want = (image.reshape(30, 4).argmax(-1) == one.label).mean()
    assert right == pytest.approx(want)
    for size in (1, 7, 30):
        assert score(network, nothing, one, scale, size, task) == right


def test_maps_do_not_depend_on_the_size_of_the_batches(corners, monkeypatch):
    config = Config(dataset=corners, method="backprop", devices=1, batch_size=7)
    setting, index = prepare(config), np.arange(3, 23)
    seen = []

    def shown(variables, image):
        seen.append(len(image))
        return 2 * image

    def batches():
        return list(feature_maps.image_batches(setting, setting.dataset.test, index))

    whole = feature_maps.maps(shown, hj.Variables({}, {}), batches())
    monkeypatch.setattr(finished, "_SMALL", 64)
    parts = feature_maps.maps(shown, hj.Variables({}, {}), batches())
    np.testing.assert_array_equal(whole, parts)
    assert seen == [20, 7, 7, 7]  # one program for all batches


def test_fewer_examples_explain_large_maps(corners, monkeypatch):
    setting = prepare(Config(dataset=corners, devices=1), teach=True)
    seen = []

    def note(setting, split, index):
        seen.append(len(index))
        raise LookupError

    monkeypatch.setattr(explained, "image_batches", note)
    for most in (10**9, 1):
        with pytest.raises(LookupError):
            explained.explained_by(setting, hj.Variables({}, {}), most)
    assert seen == [86, 1]
