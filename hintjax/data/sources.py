"""An image classification set from its name."""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hintjax._checks import Refusal, message
from hintjax.data.files import Files, Source
from hintjax.data.folder import image_folder
from hintjax.data.images import UNLABELED, Split, Standardize
from hintjax.data.records import (
    MODES,
    ONE_SHAPE,
    Records,
    builder_of,
    cropped,
    folder_of,
    optional_module,
    pillow,
    records,
)
from hintjax.data.splits import Range, carved, checked_split, numbered, stratified
from hintjax.data.standardize import statistics
from hintjax.data.targets import Targets

ON_DEVICE = 2 * 2**30  # bytes: a set up to this size is kept on the device
IN_MEMORY = 16 * 2**30  # bytes: a set above this size stays on disk
TEST = 0.2  # fraction held out as a test split when the dataset has none
_SAVE = "Write it with numpy.savez(path, image=..., label=...)."


class Dataset(NamedTuple):
    """An image classification set in three disjoint splits, decoded or on disk.

    Without labels there are no classes, and every label is -1.
    """

    name: str
    classes: int
    train: Source
    validation: Source
    test: Source
    standardize: Standardize
    class_names: tuple[str, ...]

    @property
    def labeled(self) -> bool:
        """Whether there are labels."""
        return bool(self.class_names)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation: float = 0.1,
    limit: int | None = None,
    labels: int | None = None,
    size: int | None = None,
    range: Range | None = None,
    targets: Targets | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads an image classification dataset, into memory as uint8 if it fits.

    A dataset with its own "validation" and "test" splits keeps them. Without "test",
    its "validation" becomes the test split; without both, a fifth of "train", the same
    for every seed. Without "validation", a part of "train" becomes the validation
    split. Splits are cut by class.

    Args:
      name: "digits" (scikit-learn's, embedded), a path that ends in .npz, a folder of
        images (see `image_folder`), or a set of TensorFlow Datasets prepared as
        array_record: "mnist", "emnist/letters", "cifar10:3.0.2". An .npz file holds
        `image` (uint8, [n h w] or [n h w c]) and `label` (integers), and may hold
        `image_test`, `label_test` and `class_names`. Without `class_names`, the classes
        are the labels that occur, in their order: the labels 3, 10 and 57 become 0, 1
        and 2, and the names "3", "10" and "57". An .npz file of images alone has no
        labels.
      data_dir: where prepared sets are; by default TFDS_DATA_DIR, or
        ~/tensorflow_datasets.
      validation: fraction of "train" that becomes the validation split, in (0, 1).
      limit: number of training examples to keep; a smaller limit keeps a subset of
        what a larger limit keeps. Validation, test and `standardize` do not depend on
        it.
      labels: number of training examples that keep their labels. The others stay
        without a label, which then is -1. They are the examples that an equal `limit`
        keeps, and a smaller number keeps a subset. Validation and test keep all labels.
      size: images are scaled and cropped at the center to size x size. None keeps them.
      range: the range of pixels that are not uint8, in an .npz file: "0..1" or
        "0..255". They are converted to uint8, rounded to the nearest of 256 values.
      targets: the labels of a task other than classification, in an .npz file; see
        `hintjax.data.targets`. By default labels are classes.
      seed: the seed of the validation split and of the limit.

    Returns:
      A Dataset of numpy arrays. Above IN_MEMORY, a folder of images gives Files, but
      for splits that fit on the device. A set of TensorFlow Datasets gives Records,
      which are cut by percent instead of by class. Both stay on disk, and are decoded
      when they are read. `standardize` is measured on "train" before `limit`, so that a
      student with few labels sees the inputs of its teacher.

    >>> digits = load("digits", limit=500)
    >>> digits.train.image.shape, digits.validation.n, digits.test.n, digits.classes
    ((500, 8, 8, 1), 144, 359, 10)
    """
    if not 0 < validation < 1:
        do = "It is the share of train that is kept for choosing between runs."
        raise Refusal(message("load", "validation in (0, 1)", str(validation), do))
    if range is not None and not name.endswith(".npz"):
        wanted = f"no range for {name!r}, whose pixels are uint8"
        raise Refusal(message("load", wanted, repr(range), "Leave it out."))
    _check_targets(name, size, targets)
    if name == "digits":
        splits, names = _digits()
    elif name.endswith(".npz"):
        splits, names = _npz(Path(name).expanduser(), range, targets)
    elif (folder := folder_of(name, data_dir)) is not None:
        splits, names = image_folder(folder, size, IN_MEMORY)
    else:
        stored, names = _tfds(name, data_dir, size)
        if sum(map(_nbytes, stored.values())) > IN_MEMORY:
            kept = limit if labels is None else labels
            return _on_disk(stored, names, data_dir, size, validation, kept)
        splits = {k: split.read(np.arange(split.n)) for k, split in stored.items()}
    splits = {key: _resized(split, size) for key, split in splits.items()}
    train = splits["train"]
    if "test" not in splits:
        # Not by `seed`: a student must never train on what its teacher is tested on.
        cut = carved("test", train.label, round(TEST * train.n), seed=0)
        splits["test"], train = map(train.part, cut)
    if "validation" not in splits:
        cut = carved("validation", train.label, round(validation * train.n), seed)
        splits["validation"], train = map(train.part, cut)
    standardize = statistics(train)
    if limit is not None:
        if not 0 < limit <= train.n:
            wanted = f"limit in 1..{train.n}, the size of train of {name!r}"
            raise Refusal(message("load", wanted, str(limit), "Lower it."))
        train = train.part(stratified(train.label, limit, seed))
    if labels is not None:
        train = _few_labels(name, train, labels, names, seed)
    splits["train"] = train
    for key, split in splits.items():
        if split.shape != train.shape:
            got = f"{train.shape} in train and {split.shape} in {key} of {name!r}"
            raise Refusal(message("load", ONE_SHAPE, got, "Pass size=."))
    near = {key: _near(split) for key, split in splits.items()}
    return Dataset(
        name, len(names), **near, standardize=standardize, class_names=tuple(names)
    )


def _near(split: Split | Files) -> Split | Files:
    """The split; in memory, if it fits on the device."""
    if isinstance(split, Files) and fits_on_device(split):
        return split.read(np.arange(split.n))
    return split


def _few_labels(
    name: str, train: Split | Files, labels: int, names: Sequence[str], seed: int
) -> Split | Files:
    """The split with so many labels; the other examples have none."""
    if not names:
        wanted = f"labels of {name!r}, some of which are kept"
        raise Refusal(message("load", wanted, "none", "Leave out labels= (--labels)."))
    if not 0 < labels <= train.n:
        wanted = f"labels in 1..{train.n}, the training examples of {name!r}"
        raise Refusal(message("load", wanted, str(labels), "Lower it."))
    kept = stratified(train.label, labels, seed)
    label = np.full_like(train.label, UNLABELED)
    label[kept] = train.label[kept]
    return train._replace(label=label)


def _digits() -> tuple[dict[str, Split], Sequence[str]]:
    """The splits and class names of the digits of scikit-learn."""
    bunch = optional_module("sklearn.datasets").load_digits()
    image = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in bunch.target_names]
    return {"train": checked_split("digits", image, bunch.target, len(names))}, names


def _check_targets(name: str, size: int | None, targets: Targets | None) -> None:
    """Raises unless a dataset of this name and size can have such labels."""
    if targets is None:
        return
    if not name.endswith(".npz"):
        wanted = f"an .npz file with {targets.wanted}"
        do = "Only classification reads other datasets."
        raise Refusal(message("load", wanted.rstrip(","), repr(name), do))
    if targets.positions and size is not None:
        wanted = "no size with a label for each position"
        raise Refusal(message("load", wanted, f"{size}", "Scale images and labels."))


def _npz(
    path: Path, range: Range | None = None, targets: Targets | None = None
) -> tuple[dict[str, Split], Sequence[str]]:
    """The splits and class names of an .npz file."""
    wanted = ("image", "label", "image_test", "label_test", "class_names")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in wanted if key in file.files}
            found = file.files
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        wanted = f"{path} to be an .npz file of plain arrays"
        raise Refusal(message("load", wanted, str(error), _SAVE)) from error
    pairs = {"train": ("image", "label")}
    if "image_test" in arrays or "label_test" in arrays:
        pairs["test"] = ("image_test", "label_test")
    if set(found) in ({"image"}, {"image", "image_test"}) and targets is None:
        return _without_labels(path.name, arrays, range), []
    missing = sorted({key for pair in pairs.values() for key in pair} - set(arrays))
    if missing:
        wanted = f"{path} to hold {' and '.join(missing)}"
        got = f"only {', '.join(sorted(found)) or 'nothing'}"
        raise Refusal(message("load", wanted, got, _SAVE))
    if targets is not None:
        return _with_targets(path.name, arrays, pairs, range, targets)
    labels = [arrays[label] for _, label in pairs.values()]
    if "class_names" in arrays:
        names = [str(name) for name in arrays["class_names"].ravel()]
    elif all(np.issubdtype(one.dtype, np.integer) for one in labels):
        labels, ids = numbered(path.name, labels)
        names = list(map(str, ids))
    else:
        names = []  # `checked_split` raises
    splits = {
        key: checked_split(
            f"{image} of {path.name}", arrays[image], label, len(names), range
        )
        for (key, (image, _)), label in zip(pairs.items(), labels, strict=True)
    }
    if len(names) == 1:
        wanted = f"labels of two classes or more in {path.name}"
        do = "With one class there is nothing to learn."
        raise Refusal(message("load", wanted, f"only {names[0]}", do))
    return splits, names


def _without_labels(
    name: str, arrays: Mapping[str, np.ndarray], range: Range | None
) -> dict[str, Split]:
    """The splits of an .npz file of images alone."""
    splits = {}
    for key, image in (("train", "image"), ("test", "image_test")):
        if image in arrays:
            n = len(arrays[image]) if arrays[image].ndim else 0
            label = np.zeros(n, np.int32)
            split = checked_split(f"{image} of {name}", arrays[image], label, 1, range)
            splits[key] = split._replace(label=label + UNLABELED)
    return splits


def _with_targets(
    name: str,
    arrays: Mapping[str, np.ndarray],
    pairs: Mapping[str, tuple[str, str]],
    range: Range | None,
    targets: Targets,
) -> tuple[dict[str, Split], Sequence[str]]:
    """The splits of an .npz file whose labels are no classes; names of the outputs."""
    splits = {}
    for key, (image, label) in pairs.items():
        where, shape = f"{image} of {name}", arrays[image].shape
        given = targets.read(f"{label} of {name}", arrays[label], shape)
        one_class = np.zeros(len(given), np.int32)
        split = checked_split(where, arrays[image], one_class, 1, range)
        splits[key] = split._replace(label=given)
    labels = [split.label for split in splits.values()]
    if len({one.shape[1:] for one in labels}) > 1 and not targets.positions:
        wanted = f"labels of one shape in {name}"
        got = " and ".join(str(one.shape) for one in labels)
        raise Refusal(message("load", wanted, got, _SAVE))
    outputs = targets.outputs(labels)
    names = [str(one) for one in arrays.get("class_names", np.arange(outputs)).ravel()]
    if len(names) != outputs:
        wanted = f"{outputs} class_names in {name}"
        raise Refusal(message("load", wanted, f"{len(names)}", _SAVE))
    return splits, names


def _tfds(
    name: str, data_dir: str | os.PathLike[str] | None, size: int | None
) -> tuple[dict[str, Records], Sequence[str]]:
    """The splits and class names of a prepared set of TensorFlow Datasets."""
    splits = {
        key: records(name, data_dir, key, size=size)
        for key in builder_of(name, data_dir).info.splits
        if key in ("train", "validation", "test")
    }
    if "train" not in splits:
        do = "Read it by records(name, data_dir, split)."
        raise Refusal(message("load", f"a train split of {name!r}", "none", do))
    test = splits.get("test")
    if test is not None and test.labels([0])[0] < 0:
        del splits["test"]  # published without labels, as ImageNet's
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return splits, splits["train"].class_names


def _on_disk(
    splits: dict[str, "Records"],
    names: Sequence[str],
    data_dir: str | os.PathLike[str] | None,
    size: int | None,
    validation: float,
    limit: int | None,
) -> Dataset:
    """The splits of a set that is too large to decode, as Records."""
    train = splits["train"]
    if limit is not None:
        wanted = f"no limit for {train.name!r}, which stays on disk"
        raise Refusal(message("load", wanted, str(limit), "Pass a smaller size=."))

    def part(of: str, where: str) -> Records:
        return records(train.name, data_dir, f"{of}[{where}]", size=size)

    # By percent of the file: TFDS shuffles when it prepares a set.
    if "test" not in splits:
        kept = 100 - round(100 * TEST)
        splits["test"] = part("train", f"{kept}%:")
    else:
        kept = 100
    if "validation" not in splits:
        cut = round(kept * (1 - validation))
        splits["validation"] = part("train", f"{cut}%:{kept}%")
        kept = cut
    train = part("train", f":{kept}%")
    return Dataset(
        train.name,
        len(names),
        train,
        splits["validation"],
        splits["test"],
        statistics(train),
        tuple(names),
    )


def _resized(split: Split | Files, size: int | None) -> Split | Files:
    """The split with images scaled and cropped to size x size."""
    if size is None or isinstance(split, Files) or split.shape[:2] == (size, size):
        return split
    if split.n * size * size * split.shape[-1] > IN_MEMORY:
        wanted = f"a size at which {split.n} images fit into {IN_MEMORY} bytes"
        raise Refusal(message("load", wanted, str(size), "Lower it."))
    if split.shape[-1] not in MODES:
        wanted = "images of 1, 3 or 4 channels to resize"
        do = "Leave size= out."
        raise Refusal(message("load", wanted, str(split.shape), do))
    channels = split.shape[-1]
    flat = split.image[..., 0] if channels == 1 else split.image
    image = np.stack([cropped(pillow().fromarray(one), size) for one in flat])
    return split._replace(image=image.reshape(-1, size, size, channels))


def _nbytes(source: Source) -> int:
    """The size of a split decoded to uint8, with the labels of its positions."""
    labels = source.label if isinstance(source, Split) else None
    dense = labels.nbytes if labels is not None and labels.ndim > 1 else 0
    return source.n * int(np.prod(source.shape)) + dense


def fits_on_device(*sources: Source, limit: int = ON_DEVICE) -> bool:
    """Whether these splits, decoded to uint8, take at most `limit` bytes together."""
    return sum(map(_nbytes, sources)) <= limit
