"""Decoding, splits, batches on the device, and streams; no network, no TensorFlow."""

import io
import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import data
from hintjax.data import sources
from hintjax.data.splits import stratified

DATA = Path(__file__).parents[3] / "shared" / "data"
AUGMENTS = [
    data.Augment(flip=True),
    data.Augment(pad=1, flip=True),
    data.Augment(pad=2, reflect=True),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def images(n: int, shape=(5, 6, 3), seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def split(n: int, classes: int = 3, **kwargs) -> data.Split:
    return data.Split(images(n, **kwargs), np.arange(n, dtype=np.int32) % classes)


def png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    file.seek(0)
    return file


def prepare(folder: Path, name: str, splits: dict[str, data.Split], **options) -> None:
    """Writes a real array_record set, as tfds would, from PNG bytes."""
    import tensorflow_datasets as tfds

    file_format = options.get("file_format", "array_record")
    shape = options.get("shape") or splits["train"].shape

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(options.get("version", "1.0.0"))
        code_path = None  # there are no checksums beside this file

        def _info(self):
            dtype = options.get("dtype", np.uint8)
            image = tfds.features.Image(shape=shape, dtype=dtype, encoding_format="png")
            label = options.get("label", tfds.features.ClassLabel(num_classes=3))
            other = tfds.features.Text()
            features = {"image": image, "label": label, "id": other}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=options.get("keys", ("image", "label")),
            )

        def _split_generators(self, _):
            return {key: self._generate_examples(key) for key in splits}

        def _generate_examples(self, key):
            for i, (image, label) in enumerate(zip(*splits[key], strict=True)):
                yield i, {"image": png(image), "label": int(label), "id": f"{key}{i}"}

    Builder.name = name
    builder = Builder(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    color = {"train": split(60), "test": split(9, seed=1)}
    prepare(folder, "tiny", color)
    gray = {
        "train": split(20, shape=(4, 4, 1)),
        "validation": split(8, shape=(4, 4, 1)),
    }
    prepare(folder, "gray", gray, version="1.0.0")
    prepare(folder, "gray", {"train": split(30, shape=(4, 4, 1))}, version="1.10.0")
    return folder, color


def ordered(one: data.Split) -> tuple[np.ndarray, np.ndarray]:
    """Independent of the order in which tfds wrote the examples."""
    rows = np.concatenate([one.label[:, None], one.image.reshape(one.n, -1)], axis=1)
    return rows[np.lexsort(rows.T)]


def same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def crop_by_hand(image, pad, dy, dx, flip, reflect):
    mode = {"mode": "reflect"} if reflect else {}
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), **mode)
    cut = padded[dy : dy + image.shape[0], dx : dx + image.shape[1]]
    return cut[:, ::-1] if flip else cut


# From disk.


def test_digits():
    digits = data.load("digits")
    assert digits.classes == 10 and digits.class_names[3] == "3"
    assert (digits.train.n, digits.validation.n, digits.test.n) == (1294, 144, 359)
    assert digits.train.image.dtype == np.uint8 and digits.train.label.dtype == np.int32
    assert digits.train.shape == (8, 8, 1) and digits.train.image.max() == 255
    from sklearn.datasets import load_digits

    whole = load_digits().images
    parts = (digits.train, digits.validation, digits.test)
    got = np.sort(np.concatenate([part.image.sum((1, 2, 3)) for part in parts]))
    want = np.sort(np.floor(whole * 255 / 16 + 0.5).sum((1, 2)))
    # x.5 rounds to even, so a pixel may differ by one.
    np.testing.assert_allclose(got, want, atol=64)


def test_digits_scaled():
    assert data.load("digits", size=16).train.shape == (16, 16, 1)


def test_load_is_deterministic_and_splits_by_seed():
    first, again, other = (data.load("digits", seed=seed) for seed in (0, 0, 1))
    same(first, again)
    np.testing.assert_array_equal(first.test.image, other.test.image)
    assert not np.array_equal(first.validation.image, other.validation.image)


@pytest.mark.parametrize("count", [10, 100, 700])
def test_every_class_gets_its_share(count):
    label = np.random.RandomState(0).choice(4, 1000, p=[0.4, 0.3, 0.2, 0.1])
    chosen = stratified(label, count, seed=3)
    assert len(chosen) == len(set(chosen)) == count
    want = np.bincount(label) * count / len(label)
    assert np.abs(np.bincount(label[chosen], minlength=4) - want).max() <= 1


def test_limit_is_nested_and_touches_only_train():
    full, many, few = (data.load("digits", limit=limit) for limit in (None, 200, 50))
    assert (many.train.n, few.train.n) == (200, 50)
    assert np.bincount(few.train.label, minlength=10).min() >= 4
    same(full.standardize, data.statistics(full.train))
    rows = {image.tobytes() for image in many.train.image}
    assert {image.tobytes() for image in few.train.image} <= rows
    for part in ("validation", "test", "standardize"):
        same(getattr(full, part), getattr(few, part))


def test_npz(tmp_path):
    path = str(tmp_path / "arrays.npz")
    whole = split(60, shape=(4, 4))
    np.savez(path, image=whole.image, label=whole.label)
    got = data.load(path)
    assert got.train.shape == (4, 4, 1) and got.classes == 3
    assert (got.train.n, got.validation.n, got.test.n) == (43, 5, 12)

    test = split(7, seed=1)
    arrays = {"image": images(40), "label": np.arange(40, dtype=np.uint8) % 3}
    names = np.array(["cat", "dog", "owl", "fox"])
    np.savez(
        path, **arrays, image_test=test.image, label_test=test.label, class_names=names
    )
    got = data.load(path)
    same(got.test, test)
    assert got.classes == 4 and got.class_names == ("cat", "dog", "owl", "fox")
    assert got.train.n + got.validation.n == 40


def test_tfds(prepared):
    folder, want = prepared
    got = data.load("tiny", folder)
    assert got.classes == 3 and got.train.shape == (5, 6, 3)
    assert (got.train.n, got.validation.n) == (54, 6)
    np.testing.assert_array_equal(ordered(got.test), ordered(want["test"]))
    both = (got.train, got.validation)
    both = data.Split(*map(np.concatenate, zip(*both, strict=True)))
    np.testing.assert_array_equal(ordered(both), ordered(want["train"]))
    same(got, data.load("tiny", folder))


def test_tfds_takes_the_newest_version_and_an_asked_one(prepared, monkeypatch):
    folder, _ = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    assert data.records("gray").n == 30
    assert data.records("gray:1.0.0").n == 20
    assert data.records("gray:1.0.*").shape == (4, 4, 1)


def test_tfds_validation_stands_in_for_a_missing_test(prepared):
    got = data.load("gray:1.0.0", prepared[0])
    assert (got.train.n, got.validation.n, got.test.n) == (18, 2, 8)


def test_tfds_test_without_labels_is_left_out(tmp_path):
    one = split(20)
    hidden = data.Split(one.image, np.full(20, -1, np.int32))
    splits = {"train": one, "validation": split(8, seed=1), "test": hidden}
    prepare(tmp_path, "hidden", splits)
    got = data.load("hidden", tmp_path)
    assert (got.train.n, got.validation.n, got.test.n) == (18, 2, 8)
    prepare(tmp_path, "open", {**splits, "test": one})
    got = data.load("open", tmp_path)
    assert (got.train.n, got.validation.n, got.test.n) == (20, 8, 20)
    with pytest.raises(ValueError, match=r"labels in 0\.\.2 in 'test' of 'hidden'"):
        data.records("hidden", tmp_path, "test").read(range(3))


def test_records(prepared):
    folder, _ = prepared
    whole = data.records("tiny", folder)
    part = data.records("tiny", folder, "train[50%:]", size=8)
    assert (whole.n, part.n, part.shape) == (60, 30, (8, 8, 3))
    one = whole.read(np.array([7, 3, 7]))
    np.testing.assert_array_equal(one.image[0], one.image[2])
    np.testing.assert_array_equal(one.label, whole.labels([7, 3, 7]))
    assert data.fits_on_device(whole, part)
    assert not data.fits_on_device(whole, part, limit=60 * 90 + 30 * 192 - 1)
    sampled = data.statistics(whole, sample=60)
    exact = data.statistics(whole.read(range(60)))
    same(sampled, exact)


def test_sets_of_many_shapes_need_a_size(tmp_path):
    shapes = [(5, 6, 3), (7, 5, 3), (9, 9, 1)]  # the last is stored in gray
    mixed = ([images(1, shape)[0] for shape in shapes], [0, 1, 2])
    prepare(tmp_path, "mixed", {"train": mixed}, shape=(None, None, 3))
    with pytest.raises(ValueError, match="one shape.*size="):
        data.records("mixed", tmp_path).read(range(3))
    assert data.records("mixed", tmp_path, size=4).read(range(3)).shape == (4, 4, 3)


def test_statistics_do_not_depend_on_the_images_counted_at_a_time(
    prepared, monkeypatch
):
    sources = split(300), data.records("tiny", prepared[0])
    want = [data.statistics(one, sample=7) for one in sources]
    for size in (1, 4 * 90):
        monkeypatch.setattr("hintjax.data.standardize._CHUNK_BYTES", size)
        for one, whole in zip(sources, want, strict=True):
            same(data.statistics(one, sample=7), whole)


def test_statistics():
    one = split(300)
    got = data.statistics(one)
    pixels = one.image.reshape(-1, 3) / 255
    np.testing.assert_allclose(got.mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.std, pixels.std(0), rtol=1e-6)
    constant = one._replace(image=np.full_like(one.image, 7))
    batch = next(data.evaluation_batches(constant, 3, data.statistics(constant)))
    np.testing.assert_allclose(batch["image"], 0, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_sets(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no prepared {name} in {DATA}")
    one = data.records(name, DATA, "test[:64]")
    got = one.read(range(64))
    assert got.shape == {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
    assert len(one.class_names) == 10 and len(set(got.label)) == 10
    assert 20 < got.image.mean() < 150


def test_light(prepared):
    """No TensorFlow, and nothing heavy before it is needed."""
    code = """
import sys
import hintjax.data as data
heavy = ("tensorflow_datasets", "grain", "sklearn", "PIL", "orbax", "matplotlib")
assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)
data.load("tiny", sys.argv[1])
assert "tensorflow" not in sys.modules
import jax._src.xla_bridge
assert not jax._src.xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code, str(prepared[0])], check=True)
    assert "tensorflow" not in sys.modules


# Errors.


def test_unknown_names(prepared):
    with pytest.raises(ValueError, match="nearest names are tiny"):
        data.load("tinny", prepared[0])
    with pytest.raises(ValueError, match="nearest names are cifar10"):
        data.load("cifar-10", prepared[0])
    with pytest.raises(ValueError, match="nearest names are digits"):
        data.load("digit", prepared[0])


def test_a_file_of_another_kind_is_no_name(prepared, tmp_path):
    np.save(tmp_path / "images.npy", IMAGE)
    with pytest.raises(ValueError, match=r"written by numpy\.savez and ends in .npz"):
        data.load(str(tmp_path / "images.npy"), prepared[0])


def test_not_prepared(prepared):
    with pytest.raises(ValueError, match=r"(?s)nothing there.*pip install tensorflow"):
        data.load("mnist", prepared[0])
    with pytest.raises(ValueError, match=r"download_and_prepare\(file_format=\"array_"):
        data.load("emnist/letters", prepared[0])
    with pytest.raises(ValueError, match=r"got 1\.\d+\.0, 1\.\d+\.0 there"):
        data.load("gray:2.0.0", prepared[0])


def test_configurations(tmp_path):
    for config in ("letters/1.0.0", "digits/1.0.0", "incomplete.AB12_1.0.0"):
        folder = tmp_path / "emnist" / config
        folder.mkdir(parents=True)
        (folder / "features.json").touch()
    with pytest.raises(ValueError, match=r"digits, letters\. Write emnist/digits"):
        data.load("emnist", tmp_path)


def test_stored_as_tfrecord(prepared, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json"):
        text = (prepared[0] / "tiny" / "1.0.0" / name).read_text()
        (folder / name).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"(?s)tfrecord.*another_data_dir"):
        data.load("tiny", tmp_path)


def test_records_errors(prepared, tmp_path):
    folder, _ = prepared
    for wrong in ("validation", "train[:0]", "train[:1%"):
        with pytest.raises(ValueError, match=r"'tiny' with examples \(test, train, or"):
            data.records("tiny", folder, wrong)
    import tensorflow_datasets as tfds

    one = {"train": split(2)}
    prepare(tmp_path, "scalar", one, label=tfds.features.Scalar(np.int64))
    with pytest.raises(TypeError, match="image classification set.*id, image, label"):
        data.load("scalar", tmp_path)
    prepare(tmp_path, "text", one, keys=("id", "label"))
    with pytest.raises(TypeError, match="image classification set.*got 'text'"):
        data.load("text", tmp_path)
    prepare(tmp_path, "deep", one, dtype=np.uint16)
    with pytest.raises(ValueError, match="uint8 images.*got uint16 of 3 in 'deep'"):
        data.load("deep", tmp_path)
    prepare(tmp_path, "others", {"part": one["train"]}, shape=(5, 6, 3))
    with pytest.raises(ValueError, match="a train split of 'others'"):
        data.load("others", tmp_path)


def test_a_set_too_large_to_decode_stays_on_disk(prepared, monkeypatch):
    decoded = data.load("tiny", prepared[0])
    monkeypatch.setattr(sources, "IN_MEMORY", 1000)
    on_disk = data.load("tiny", prepared[0])
    splits = (on_disk.train, on_disk.validation, on_disk.test)
    assert all(isinstance(split, data.Records) for split in splits)
    assert on_disk.classes == decoded.classes
    assert (
        on_disk.train.n + on_disk.validation.n == decoded.train.n + decoded.validation.n
    )
    everything = [split.read(range(split.n)).image for split in splits]
    whole = {image.tobytes() for images in everything for image in images}
    assert len(whole) == sum(len(images) for images in everything)  # disjoint
    with pytest.raises(ValueError, match="no limit for 'tiny', which stays on disk"):
        data.load("tiny", prepared[0], limit=3)


def test_broken_image(prepared):
    records = data.records("tiny", prepared[0])
    with pytest.raises(ValueError, match="an image in example 4 of 'train' of 'tiny'"):
        records._decode(4, {"image": b"no image"})


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hintjax\[data\]'"):
        data.load("digits")


IMAGE, LABEL = images(30), np.arange(30) % 3


@pytest.mark.parametrize(
    ("arrays", "error", "match"),
    [
        (
            {"images": IMAGE, "label": LABEL},
            ValueError,
            "hold image, got only images, ",
        ),
        (
            {"image": IMAGE, "labels": LABEL},
            ValueError,
            "hold label, got only image, labels",
        ),
        (
            {"image": IMAGE, "label": LABEL, "image_test": IMAGE},
            ValueError,
            "label_test",
        ),
        (
            {"image": IMAGE / 255, "label": LABEL},
            TypeError,
            r"float64 between 0 and 1\. Save .*255 \* image.*, or pass range='0\.\.1'",
        ),
        (
            {"image": IMAGE / 1, "label": LABEL},
            TypeError,
            r"0 and 255\. Save np\.round\(image\)\..*--range 0\.\.255",
        ),
        (
            {"image": IMAGE / 99 - 1, "label": LABEL},
            TypeError,
            "between -1 and 1.57576. Undo the standardization",
        ),
        ({"image": IMAGE * 1j, "label": LABEL}, TypeError, "complex128. Convert"),
        ({"image": IMAGE[0], "label": LABEL}, ValueError, r"\[n h w c\].*\(5, 6, 3\)"),
        (
            {"image": IMAGE, "label": LABEL[:9]},
            ValueError,
            r"labels \[n\].*\(9,\).*in the same order",
        ),
        (
            {"image": np.moveaxis(IMAGE, 0, -1), "label": LABEL},
            ValueError,
            r"np\.moveaxis\(image, -1, 0\)",
        ),
        (
            {"image": IMAGE.reshape(30, -1), "label": LABEL},
            ValueError,
            r"\(30, 90\).*image\.reshape\(n, height, width, channels\)",
        ),
        *(
            (
                {"image": IMAGE, "label": np.eye(3, dtype=dtype)[LABEL]},
                ValueError,
                r"one-hot labels \(30, 3\)\. Save label\.argmax\(-1\) instead",
            )
            for dtype in (float, int, bool)
        ),
        (
            {"image": IMAGE, "label": np.full((30, 3), 1 / 3)},
            ValueError,
            r"got \(30, 3\)\. If they are probabilities, save label\.argmax",
        ),
        (
            {"image": IMAGE, "label": LABEL[:, None]},
            ValueError,
            r"got \(30, 1\)\. Save label\[:, 0\]",
        ),
        ({"image": IMAGE, "label": np.int64(3)}, ValueError, "one class for each"),
        (
            {"image": IMAGE, "label": LABEL / 1},
            TypeError,
            r"integer labels.*float64.*label\.astype\(int\)",
        ),
        ({"image": IMAGE, "label": LABEL - 1}, ValueError, r"labels >= 0 .*got -1\."),
        (
            {"image": IMAGE, "label": (LABEL - 1).astype(np.uint8)},
            ValueError,
            "labels >= 0 .*got 255, which is -1 as uint8",
        ),
        (
            {
                "image": IMAGE,
                "label": LABEL,
                "image_test": IMAGE,
                "label_test": (LABEL - 1).astype(np.uint64),
            },
            ValueError,
            "got 18446744073709551615, which is -1 as uint64",
        ),
        (
            {"image": IMAGE, "label": LABEL.astype(str)},
            TypeError,
            r"integer labels.*np\.unique\(label, return_inverse=True\)",
        ),
        *(
            (
                {"image": np.zeros((30, channels, 8, 9), np.uint8), "label": LABEL},
                ValueError,
                r"channels last.*, 8, 9\)\. Save image\.transpose\(0, 2, 3, 1\)",
            )
            for channels in (1, 3)
        ),
        *(
            ({"image": IMAGE, "label": label}, TypeError, f"with {odd}.*classifiers")
            for label, odd in ((LABEL + 0.5, "0.5"), (LABEL * np.nan, "nan"))
        ),
        (
            {"image": IMAGE, "label": np.full(30, 7)},
            ValueError,
            "labels of two classes or more in arrays.npz, got only 7",
        ),
        (
            {"image": IMAGE.astype(np.uint16) * 257, "label": LABEL},
            TypeError,
            r"uint16 between 0 and 65535\. Scale them.*image // 257",
        ),
        (
            {"image": np.zeros((30, 2, 5, 6, 3), np.uint8), "label": LABEL},
            ValueError,
            "Only images are read: save one slice",
        ),
        (
            {"image": IMAGE[:, :0], "label": LABEL},
            ValueError,
            r"images of one pixel or more .*got \(30, 0, 6, 3\)",
        ),
        ({"image": IMAGE[:0], "label": LABEL[:0]}, ValueError, "an empty split"),
        ({"image": IMAGE[:2], "label": LABEL[:2]}, ValueError, "too small to cut"),
        ({"image": IMAGE, "label": LABEL.astype(object)}, ValueError, "plain arrays"),
        (
            {"image": IMAGE, "label": LABEL, "class_names": np.array(["a", "b"])},
            ValueError,
            r"labels in 0\.\.1 .*got 2 at 2 \(10 of 30",
        ),
        (
            {
                "image": IMAGE,
                "label": LABEL,
                "image_test": IMAGE[:, 1:],
                "label_test": LABEL,
            },
            ValueError,
            r"one shape, got \(5, 6, 3\) in train and \(4, 6, 3\) in test.*size=",
        ),
    ],
)
def test_npz_errors(tmp_path, arrays, error, match):
    np.savez(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(error, match=f"(?s)load: .*{match}"):
        data.load(str(tmp_path / "arrays.npz"))


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([3, 10, 57, 200], np.int64),
        ([3, 10, 57, 200], np.uint8),
        ([7, 2**40], np.int64),
    ],
)
def test_class_ids_are_numbered_and_become_names(tmp_path, ids, dtype):
    """The classes that occur are 0 to k - 1, so the head has no dead outputs."""
    path, ids = str(tmp_path / "arrays.npz"), np.array(ids, dtype)
    label = np.arange(30) % len(ids)
    np.savez(path, image=IMAGE, label=ids[label])
    got = data.load(path)
    assert got.classes == len(ids) and got.class_names == tuple(map(str, ids))
    for split in (got.train, got.validation, got.test):
        for image, number in zip(*split, strict=True):
            (at,) = np.flatnonzero((image == IMAGE).all((1, 2, 3)))
            assert number == label[at]


def test_the_classes_of_both_files_splits_are_numbered_together(tmp_path):
    path = str(tmp_path / "arrays.npz")
    arrays = {"image": IMAGE, "label": np.array([10, 57], np.uint8)[LABEL % 2]}
    np.savez(path, **arrays, image_test=IMAGE[:2], label_test=np.array([57, 3]))
    got = data.load(path)
    assert got.class_names == ("3", "10", "57")
    assert set(got.train.label) == {1, 2} and got.test.label.tolist() == [2, 0]


def test_classes_without_examples_keep_their_place_if_they_have_names(tmp_path):
    path = str(tmp_path / "arrays.npz")
    np.savez(path, image=IMAGE, label=2 * LABEL, class_names=np.array(list("abcde")))
    got = data.load(path)
    assert got.classes == 5 and set(got.train.label) == {0, 2, 4}


@pytest.mark.parametrize(
    ("image", "range"),
    [
        (IMAGE / np.float32(255), "0..1"),
        (IMAGE.astype(np.float64) / 255, "0..1"),
        (IMAGE.astype(np.float16), "0..255"),
        (IMAGE.astype(np.int64), "0..255"),
        (IMAGE + 0.4 * (IMAGE < 255), "0..255"),
        (IMAGE, "0..255"),
    ],
)
def test_numbers_in_a_range_are_the_same_pixels(tmp_path, image, range):
    path = str(tmp_path / "arrays.npz")
    np.savez(path, image=IMAGE, label=LABEL)
    want = data.load(path)
    np.savez(path, image=image, label=LABEL)
    same(data.load(path, range=range).train, want.train)


def test_black_and_white_are_in_a_range_too(tmp_path):
    path = str(tmp_path / "arrays.npz")
    for dtype in (bool, np.uint8):
        np.savez(path, image=(IMAGE > 99).astype(dtype), label=LABEL)
        got = data.load(path, range="0..1").train.image
        assert got.dtype == np.uint8 and set(got.ravel()) == {0, 255}


@pytest.mark.parametrize(
    ("image", "range", "match"),
    [
        (IMAGE / 1, "0..1", r"0\.\.1 in image .* Pass range='0\.\.255' \(--range"),
        (IMAGE, "0..1", r"pixels in 0\.\.1 .*uint8 between 0 and 255"),
        (IMAGE / 99 - 1, "0..255", "between -1 and 1.57576."),
        (np.where(IMAGE > 9, IMAGE, np.nan), "0..255", "finite pixels.*with NaN"),
        (np.where(IMAGE > 9, IMAGE, np.inf), "0..1", "finite pixels.*with NaN or inf"),
        (IMAGE / 255, "0..255", r"between 0 and 1\. Pass range='0\.\.1'"),
        (IMAGE.astype(np.uint16) * 257, "0..255", "65535. Scale them"),
    ],
)
def test_numbers_outside_of_the_range_are_refused(tmp_path, image, range, match):
    path = str(tmp_path / "arrays.npz")
    np.savez(path, image=image, label=LABEL)
    with pytest.raises(ValueError, match=match):
        data.load(path, range=range)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "arrays.npz"
    for content in (None, b"", b"no zip", b"\x93NUMPY\x01\x00"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="to be an .npz file.*numpy.savez"):
            data.load(str(path))
    with path.open("wb") as file:
        np.save(file, IMAGE)
    with pytest.raises(ValueError, match="to be an .npz file"):
        data.load(str(path))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"range": "0..1"}, "no range for 'digits', whose pixels are uint8"),
        ({"validation": 0.0}, r"validation in \(0, 1\), got 0.0"),
        ({"validation": 1e-9}, "at least one example in validation"),
        ({"limit": 0}, r"limit in 1\.\.1294"),
        ({"limit": 2000}, r"limit in 1\.\.1294.*got 2000"),
    ],
)
def test_load_errors(options, match):
    with pytest.raises(ValueError, match=match):
        data.load("digits", **options)


def test_batch_errors():
    with pytest.raises(ValueError, match=r"batch_size in 1\.\.10.*got 64.*limit="):
        data.steps_per_epoch(10, 64)
    with pytest.raises(ValueError, match="batch_size"):
        data.steps_per_epoch(10, 0)
    one = split(10)
    scale, placed = data.statistics(one), data.place(one)
    for augment, match in (
        (data.Augment(flip=True), "a key for Augment.*a new one at every step"),
        *(
            (data.Augment(pad=5, reflect=reflect), "a pad below the image's 5 pixels")
            for reflect in (True, False)
        ),
    ):
        key = jax.random.key(0) if augment.pad else None
        take = partial(data.take, key=key, augment=augment)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(take, placed, np.arange(2), scale)
    with pytest.raises(ValueError, match="batch size above 0"):
        next(data.evaluation_batches(one, 0, scale))
    empty = data.Split(one.image[:0], one.label[:0])
    with pytest.raises(ValueError, match="split with examples"):
        next(data.evaluation_batches(empty, 2, scale))
    with pytest.raises(ValueError, match=r"batch_size in 1\.\.10.*got 12"):
        data.stream(one, 6, scale, process_count=2)
    with pytest.raises(ValueError, match=r"process_index in 0\.\.1, got 2"):
        data.stream(one, 2, scale, process_index=2, process_count=2)


# On the device.


def test_order_is_a_permutation_of_its_own_each_epoch():
    key = jax.random.key(0)
    first, again, other = (
        data.order(jax.random.fold_in(key, epoch), 101) for epoch in (0, 0, 1)
    )
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.sort(first), np.arange(101))
    np.testing.assert_array_equal(np.sort(other), np.arange(101))


def test_an_epoch_shows_each_example_once():
    one = split(23)
    placed, scale, key = data.place(one), data.statistics(one), jax.random.key(1)
    take = jax.jit(data.take)
    steps = data.steps_per_epoch(one.n, 5)
    seen = []
    for step in range(2 * steps):  # by the formula of the module's first lines
        epoch, i = divmod(step, steps)
        order = data.order(jax.random.fold_in(key, epoch), one.n)
        batch = take(placed, order[i * 5 : (i + 1) * 5], scale)
        np.testing.assert_array_equal(batch["label"], one.label[batch["index"]])
        seen.append(batch["index"].tolist())
    assert steps == 4
    assert len(set(np.ravel(seen[:4]))) == len(set(np.ravel(seen[4:]))) == 20
    assert seen[:4] != seen[4:]


def test_take_plain():
    one = split(9)
    scale, index = data.statistics(one), np.array([4, 4, 0])
    batch = jax.jit(data.take)(data.place(one), index, scale)
    want = (one.image[index] / 255 - scale.mean) / scale.std
    np.testing.assert_allclose(batch["image"], want, rtol=1e-5, atol=1e-6)
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "image": "float32",
        "label": "int32",
        "index": "int32",
    }


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_take_augments_as_numpy_does(augment):
    one = split(100)
    # One step of standardization that gives the pixels back.
    pixels = data.Standardize(np.zeros(3, np.float32), np.full(3, 1 / 255, np.float32))
    key = jax.random.key(2)
    batch = jax.jit(
        lambda one: data.take(one, np.arange(100), pixels, key=key, augment=augment)
    )
    got = np.rint(batch(data.place(one))["image"]).astype(np.uint8)
    seen = set()
    for image, result in zip(one.image, got, strict=True):
        end, flips = 2 * augment.pad + 1, (False, True)[: 1 + augment.flip]
        matches = [
            (dy, dx, flip)
            for dy in range(end)
            for dx in range(end)
            for flip in flips
            if np.array_equal(
                result, crop_by_hand(image, augment.pad, dy, dx, flip, augment.reflect)
            )
        ]
        assert len(matches) == 1
        seen.update(matches)
    # 200 draws of 25 (or of 2, or of 50) reach nearly all.
    assert len(seen) >= 0.9 * end * end * len(flips)


@pytest.mark.parametrize("kind", ["placed", "host", "records"])
@pytest.mark.parametrize("batch_size", [4, 60, 64])
def test_evaluation_batches(prepared, kind, batch_size):
    records = data.records("tiny", prepared[0])
    one = records.read(range(60))
    source = {"placed": data.place(one), "host": one, "records": records}[kind]
    scale = data.statistics(one)
    batches = list(data.evaluation_batches(source, batch_size, scale))
    assert {batch["image"].shape for batch in batches} == {(batch_size, 5, 6, 3)}
    where = np.concatenate([batch["where"] for batch in batches])
    assert where.dtype == bool and where.sum() == 60
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index[where], np.arange(60))
    label = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(label[where], one.label)
    image = np.concatenate([batch["image"] for batch in batches])
    want = (one.image / 255 - scale.mean) / scale.std
    np.testing.assert_allclose(image[where], want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(image).all()


def test_place_replicates_over_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    everywhere = jax.sharding.NamedSharding(mesh, spec())
    rows = jax.sharding.NamedSharding(mesh, spec("data"))
    one = split(24)
    placed, scale = data.place(one, everywhere), data.statistics(one)
    index = jax.device_put(np.arange(16, dtype=np.int32), rows)
    key, augment = jax.random.key(0), data.Augment(pad=2, flip=True)
    take = jax.jit(lambda *args: data.take(*args, scale, key=key, augment=augment))
    got = take(placed, index)
    assert got["image"].sharding.spec[0] == "data"
    want = take(data.place(one), np.arange(16, dtype=np.int32))
    same(got, want)


# Streams.

FULL = data.Augment(pad=2, flip=True)


def collect(stream, n: int) -> list[dict[str, np.ndarray]]:
    return [next(stream) for _ in range(n)]


@pytest.fixture(params=["host", "records"])
def source(request, prepared):
    records = data.records("tiny", prepared[0])
    return records if request.param == "records" else records.read(range(60))


def test_stream_shows_each_example_once_per_epoch(source):
    scale = data.statistics(source)
    batches = collect(data.stream(source, 8, scale), 15)  # two epochs of 60
    index = np.concatenate([batch["index"] for batch in batches])
    for epoch in (index[:60], index[60:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(60))
    assert not np.array_equal(index[:60], index[60:])
    one = source.read(index)
    for key, dtype in (("image", np.float32), ("label", np.int32), ("index", np.int32)):
        assert {batch[key].dtype for batch in batches} == {np.dtype(dtype)}
    np.testing.assert_array_equal(
        np.concatenate([batch["label"] for batch in batches]), one.label
    )
    image = np.concatenate([batch["image"] for batch in batches])
    want = (one.image / 255 - scale.mean) / scale.std
    np.testing.assert_allclose(image, want, rtol=1e-5, atol=1e-6)


def test_stream_equals_take_on_the_device(source):
    scale = data.statistics(source)
    batch = next(data.stream(source, 8, scale))
    placed = data.place(source.read(range(60)))
    same_batch = jax.jit(data.take)(placed, batch["index"], scale)
    for key, value in same_batch.items():
        np.testing.assert_allclose(value, batch[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_stream_augments_as_numpy_does(augment):
    one = split(60)
    pixels = data.Standardize(np.zeros(3, np.float32), np.full(3, 1 / 255, np.float32))
    batch = next(data.stream(one, 60, pixels, augment=augment))
    end, flips = 2 * augment.pad + 1, (False, True)[: 1 + augment.flip]
    seen = set()
    for i, result in zip(batch["index"], np.rint(batch["image"]), strict=True):
        matches = [
            (dy, dx, flip)
            for dy in range(end)
            for dx in range(end)
            for flip in flips
            if np.array_equal(
                result,
                crop_by_hand(one.image[i], augment.pad, dy, dx, flip, augment.reflect),
            )
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) >= min(20, 0.9 * end * end * len(flips))


def test_stream_resumes_from_any_position(source):
    def new(seed=5):
        return data.stream(source, 8, data.statistics(source), augment=FULL, seed=seed)

    whole, states, running = [], [], new()
    for _ in range(20):
        states.append(json.loads(json.dumps(running.get_state())))
        whole.append(next(running))
    for position in (0, 1, 7, 8, 13, 19):
        resumed = new()
        resumed.set_state(states[position])
        same(collect(resumed, 20 - position), whole[position:])
    running.set_state(states[3])  # backwards, in the same iterator
    same(collect(running, 4), whole[3:7])
    assert not np.array_equal(next(new(seed=6))["index"], whole[0]["index"])


def test_stream_is_the_same_for_any_number_of_processes(source):
    def process(i, of):
        scale, where = data.statistics(source), {"process_index": i}
        return data.stream(
            source, 12 // of, scale, augment=FULL, **where, process_count=of
        )

    alone, three = process(0, 1), [process(i, 3) for i in range(3)]

    def equal(steps):
        for _ in range(steps):
            whole, parts = next(alone), [next(part) for part in three]
            for key, value in whole.items():
                together = np.concatenate([part[key] for part in parts])
                np.testing.assert_array_equal(together, value)

    equal(6)
    # And a position is one for all: a run may go on in another number of processes.
    assert [part.get_state() for part in three] == [alone.get_state()] * 3
    alone.set_state(three[1].get_state())
    equal(2)


def test_stream_with_worker_processes(prepared):
    """In a program of its own: Grain's workers start as new interpreters."""
    code = """
import sys
import numpy as np
import jax
from hintjax import data

if __name__ == "__main__":
    source = data.records("tiny", sys.argv[1])
    scale = data.statistics(source)
    augment = data.Augment(pad=2, flip=True)
    alone = data.stream(source, 8, scale, augment=augment)
    helped = data.stream(source, 8, scale, augment=augment, workers=1)
    want = [next(alone) for _ in range(6)]
    got = [next(helped) for _ in range(3)]
    state = helped.get_state()
    helped.set_state(state)
    got += [next(helped) for _ in range(3)]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    helped.close()
    print("equal")
"""
    program = prepared[0] / "program.py"
    program.write_text(code)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, str(program), str(prepared[0])],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_a_size_that_no_memory_holds_is_refused(corners):
    with pytest.raises(
        ValueError, match="load: expected a size at which .* images fit"
    ):
        data.load(corners, size=10**6)
