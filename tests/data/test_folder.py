"""Folders of images: their order, classes and splits, odd files, damaged files."""

import functools

import numpy as np
import pytest
from PIL import Image

from hintjax import data
from hintjax._checks import FileRefusal
from hintjax.data import sources
from hintjax.data.folder import image_folder

pytestmark = pytest.mark.quick

MOST = 2**30


def pixels(seed, shape=(6, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)
    return path


def only(path, size=None):
    """The pixels of the only image in a folder."""
    splits, names = image_folder(path, size, MOST)
    assert names == [] and splits["train"].n == 1
    return splits["train"].image[0]


def test_folders_are_classes_and_files_come_in_the_order_of_their_names(tmp_path):
    for seed, name in enumerate(["dog/2.png", "dog/1.BMP", "cat/a/9.png", "cat/b.png"]):
        write(tmp_path / name, pixels(seed))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / "._1.png").write_text("what macOS leaves behind")
    splits, names = image_folder(tmp_path, None, MOST)
    assert names == ["cat", "dog"] and [*splits] == ["train"]
    assert splits["train"].label.tolist() == [0, 0, 1, 1]
    want = np.stack([pixels(seed) for seed in (2, 3, 1, 0)])
    np.testing.assert_array_equal(splits["train"].image, want)


@pytest.mark.parametrize("folder", ["", "photos"])
def test_without_two_folders_there_are_no_labels(folder, tmp_path):
    for seed in range(20):
        write(tmp_path / folder / f"{seed:02}.png", pixels(seed))
    dataset = data.load(str(tmp_path))
    assert dataset.classes == 0 and not dataset.labeled
    assert dataset.train.n + dataset.validation.n + dataset.test.n == 20
    assert (dataset.train.label == -1).all() and dataset.train.label.dtype == np.int32


def test_folders_of_splits_are_read_as_splits(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            write(tmp_path / split / name / "1.png", pixels(1))
    write(tmp_path / "test" / "1.png", pixels(1))  # published without labels
    splits, names = image_folder(tmp_path, None, MOST)
    assert names == ["a", "b"] and [*splits] == ["train", "test"]
    assert splits["test"].label.tolist() == [0, 1]
    write(tmp_path / "val" / "c" / "1.png", pixels(1))
    with pytest.raises(
        ValueError, match=r"in test of .* the classes of train, got 'c'"
    ):
        image_folder(tmp_path, None, MOST)


def test_images_of_one_name_in_many_places_are_refused(tmp_path):
    for name in ("a/1.png", "b/1.png", "c.png"):
        write(tmp_path / name, pixels(1))
    with pytest.raises(ValueError, match=r"beside them, 'c.png'. Move these images"):
        image_folder(tmp_path, None, MOST)


def test_images_of_many_sizes_need_a_size(tmp_path):
    for name, shape in {"1.png": (6, 8, 3), "2.png": (9, 5, 3)}.items():
        write(tmp_path / name, pixels(1, shape))
    with pytest.raises(ValueError, match=r"\(9, 5, 3\) \('2.png'\) .* \(--size\)"):
        image_folder(tmp_path, None, MOST)
    splits, _ = image_folder(tmp_path, 4, MOST)
    assert splits["train"].shape == (4, 4, 3)
    assert isinstance(image_folder(tmp_path, 4, 96)[0]["train"], data.Split)
    assert isinstance(image_folder(tmp_path, 4, 95)[0]["train"], data.Files)


# Odd files


def test_an_image_is_turned_as_its_exif_entry_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    write(tmp_path / "1.png", pixels(1), exif=exif)
    np.testing.assert_array_equal(only(tmp_path), np.rot90(pixels(1), -1))


def test_a_damaged_exif_entry_turns_nothing(tmp_path):
    write(tmp_path / "1.jpg", pixels(1), exif=b"Exif\x00\x00no entries at all")
    assert only(tmp_path).shape == (6, 8, 3)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    for name in ("1.png", "2.webp"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / name
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(only(tmp_path / name), pixels(1))


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    gray = pixels(1, (6, 8))
    write(tmp_path / "1.png", gray.astype(np.uint16) * 257)
    np.testing.assert_array_equal(only(tmp_path), np.stack([gray] * 3, -1))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_pixels_are_laid_over_white(channels, tmp_path):
    array = pixels(1, (6, 8, channels))
    array[:3, ..., -1], array[3:, ..., -1] = 0, 255
    write(tmp_path / "1.png", array)
    shown = only(tmp_path)
    assert (shown[:3] == 255).all()
    color = array[3:, ..., : channels - 1]
    np.testing.assert_array_equal(shown[3:], np.broadcast_to(color, shown[3:].shape))


def test_palettes_and_cmyk_and_single_bits_become_colors(tmp_path):
    flat = np.full((6, 8, 3), (204, 51, 51), np.uint8)
    image = Image.fromarray(flat)
    for name, mode in (("p.png", "P"), ("cmyk.jpg", "CMYK"), ("1.bmp", "1")):
        (tmp_path / mode).mkdir()
        image.convert(mode).save(tmp_path / mode / name)
        shown = only(tmp_path / mode)
        assert shown.shape == (6, 8, 3)
        if mode == "1":
            assert set(np.unique(shown)) <= {0, 255}
        else:
            assert np.abs(shown.astype(int) - flat).max() < 12
    clear = image.convert("P")
    clear.info["transparency"] = bytes(256)
    (tmp_path / "clear").mkdir()
    clear.save(tmp_path / "clear" / "1.png")
    assert (only(tmp_path / "clear") == 255).all()


# Damaged files


def damage(path, kind):
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"hello", "cut": whole[: -len(whole) // 2]}[kind]
    )


@pytest.mark.parametrize("most", [MOST, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize(
    ("kind", "reason"), [("empty", "an empty file"), ("text", "no image"), ("cut", "")]
)
def test_a_damaged_file_is_named_and_left_out(kind, reason, most, tmp_path):
    for seed in range(12):
        path = write(tmp_path / "ab"[seed % 2] / f"{seed:02}.png", pixels(seed))
    damage(path, kind)
    with pytest.warns(UserWarning, match=rf"left out, 1 of 12: 'b/11.png' \({reason}"):
        splits, names = image_folder(tmp_path, None, most)
    assert splits["train"].n == 11 and names == ["a", "b"]
    assert splits["train"].label.tolist() == [0] * 6 + [1] * 5
    np.testing.assert_array_equal(splits["train"].read([10]).image[0], pixels(9))
    damage(tmp_path / "a" / "00.png", kind)
    match = rf"at most 1 damaged .* 2 of 12: 'a/00.png' .*'b/11.png' \({reason}"
    with pytest.raises(OSError, match=match):
        image_folder(tmp_path, None, most)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"images \(JPEG, PNG, WebP or BMP\) .* none"):
        data.load(str(tmp_path))
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="that can be read, got 1 damaged files"):
        data.load(str(tmp_path))


def test_a_link_to_a_folder_above_ends(tmp_path):
    write(tmp_path / "a" / "1.png", pixels(1))
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert only(tmp_path).shape == (6, 8, 3)


def test_the_folder_of_a_prepared_set_is_no_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "sets" / "mnist").mkdir(parents=True)
    with pytest.raises(ValueError, match="'mnist' prepared in"):
        data.load("mnist", tmp_path / "sets")
    with pytest.raises(ValueError, match="images .* in the folder mnist"):
        data.load("mnist", tmp_path / "nothing")


# More images than memory


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder of 60 images in two classes, and `load` with little memory."""
    for seed in range(60):
        write(tmp_path / "ab"[seed % 2] / f"{seed:02}.png", pixels(seed))
    whole = functools.partial(data.load, str(tmp_path))
    fits = functools.partial(data.fits_on_device, limit=0)

    def on_disk(**options):
        with monkeypatch.context() as patch:
            patch.setattr(sources, "IN_MEMORY", 1000)
            patch.setattr(sources, "fits_on_device", fits)
            return data.load(str(tmp_path), **options)

    return tmp_path, whole, on_disk


SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("options", [{}, {"size": 4}, {"limit": 9}, {"labels": 9}])
def test_images_in_files_are_the_images_in_memory(large, options):
    _, whole, on_disk = large
    ours, theirs = on_disk(**options), whole(**options)
    for key in SPLITS:
        files, split = getattr(ours, key), getattr(theirs, key)
        assert isinstance(files, data.Files) and isinstance(split, data.Split)
        assert (files.n, files.shape) == (split.n, split.shape)
        some = [files.n - 1, 0, 2, 2]
        for mine, other in ((range(files.n), split), (some, split.read(some))):
            read = files.read(mine)
            np.testing.assert_array_equal(read.image, other.image)
            np.testing.assert_array_equal(read.label, other.label)
        np.testing.assert_array_equal(files.labels(some), split.labels(some))
    for mine, other in zip(ours.standardize, theirs.standardize, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours.class_names == theirs.class_names


def test_splits_that_fit_on_the_device_are_decoded_once(large, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 1000)
    limit = 30 * 6 * 8 * 3  # validation and test are smaller than training
    fits = functools.partial(data.fits_on_device, limit=limit)
    monkeypatch.setattr(sources, "fits_on_device", fits)
    dataset = data.load(str(large[0]))
    kinds = [type(getattr(dataset, key)) for key in SPLITS]
    assert kinds == [data.Files, data.Split, data.Split]


@pytest.mark.parametrize("change", ["other pixels", "another shape", "removed", "cut"])
def test_a_file_that_changes_after_it_was_read_is_refused(large, change):
    root, _, on_disk = large
    train = on_disk().train
    path = root / train.path[7]
    if change == "removed":
        path.unlink()
    elif change == "cut":
        damage(path, "cut")
    else:
        write(path, pixels(99, (6, 8, 3) if change == "other pixels" else (6, 9, 3)))
    train.read(range(7))
    match = rf"load: expected the file '{train.path[7]}' of .* as it was at the start"
    with pytest.raises(FileRefusal, match=match):
        train.read(range(20))
    # The thread in which Grain reads ahead raises the same error.
    batches = data.stream(train, 14, data.statistics(train))
    with pytest.raises(FileRefusal, match=match):
        for _ in range(4):
            next(batches)


# Few labels, no labels


def test_images_alone_in_an_npz_file_have_no_labels(tmp_path):
    path = str(tmp_path / "images.npz")
    np.savez(path, image=pixels(1, (40, 4, 4)), image_test=pixels(2, (9, 4, 4)))
    dataset = data.load(path)
    assert not dataset.labeled and dataset.test.n == 9 and dataset.train.n == 36
    assert (dataset.test.label == -1).all()
    np.savez(path, image=pixels(1, (40, 4)))
    with pytest.raises(ValueError, match=r"images \[n h w\]"):
        data.load(path)
    with pytest.raises(ValueError, match=r"some of which are kept, got none"):
        np.savez(path, image=pixels(1, (40, 4, 4)))
        data.load(path, labels=3)


def test_few_labels_keep_all_images_and_the_labels_of_an_equal_limit():
    whole, few = data.load("digits"), data.load("digits", labels=100)
    np.testing.assert_array_equal(few.train.image, whole.train.image)
    np.testing.assert_array_equal(few.test.label, whole.test.label)
    kept = few.train.label >= 0
    assert kept.sum() == 100 and np.bincount(few.train.label[kept]).min() >= 9
    limited = data.load("digits", limit=100).train
    np.testing.assert_array_equal(few.train.image[kept], limited.image)
    np.testing.assert_array_equal(few.train.label[kept], limited.label)
    fewer = data.load("digits", labels=30).train.label >= 0
    assert not (fewer & ~kept).any()
    for labels in (0, whole.train.n + 1):
        with pytest.raises(ValueError, match="labels in 1..1294, the training"):
            data.load("digits", labels=labels)
