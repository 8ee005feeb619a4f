"""Images from disk to the device: decoded once, then cut into batches inside jit.

A set that fits (`fits_on_device`) is decoded by `load`, put on the device by `place` as
uint8, and shuffled, cropped and flipped by `order` and `take` inside the jitted step.
Where a run stands in its data is then a function of the step alone:

    epoch, i = divmod(step, steps_per_epoch(train.n, batch_size))
    index = order(fold_in(key, epoch), train.n)[i * batch_size : (i + 1) * batch_size]
    batch = take(placed, index, standardize, key=fold_in(key, step), augment=Augment(4))

A larger set is opened by `records` and read by `stream`. Both give the same batches: a
dict of "image" (float32, standardised), "label" and "index" (int32). Nothing here
downloads anything, and nothing imports TensorFlow.
"""

import importlib
import io
import operator
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Integer, PRNGKeyArray, UInt8

from hintjax._checks import message, nearest
from hintjax.sharding import spread

ON_DEVICE = 2 * 2**30  # bytes: a set up to this size is kept on the device
IN_MEMORY = 16 * 2**30  # bytes: a set above this size stays on disk
TEST = 0.2  # the share of a set that brings no test split which becomes one
_CHUNK = 1024  # images decoded or counted at a time
_ONE_SHAPE = "images of one shape"
_SAVE = "Write it with numpy.savez(path, image=..., label=...)."
_ARRAYS = "Write its arrays to an .npz file."
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

AnyArray = Array | np.ndarray


class Split(NamedTuple):
    """Decoded images and their labels, on the host."""

    image: UInt8[AnyArray, "n h w c"]
    label: Int32[AnyArray, " n"]

    @property
    def n(self) -> int:
        return self.image.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image.shape[1:]

    def read(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> "Split":
        """The examples at these positions."""
        return Split(self.image[index], self.label[index])

    def labels(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> AnyArray:
        """Their labels alone."""
        return self.label[index]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("pixels", "label"),
    meta_fields=("shape",),
)
@dataclass(frozen=True)
class Placed:
    """A Split on the device, one row per image. Made by `place`."""

    pixels: UInt8[Array, "n pixels"]
    label: Int32[Array, " n"]
    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.pixels.shape[0]

    def read(self, index: Integer[AnyArray, " batch"]) -> Split:
        """The examples at these positions."""
        image = self.pixels[index].reshape(-1, *self.shape)
        return Split(image, self.label[index])


class Standardize(NamedTuple):
    """What `take` subtracts and divides by, per channel, of images in [0, 1]."""

    mean: Float32[AnyArray, " c"]
    std: Float32[AnyArray, " c"]


class Dataset(NamedTuple):
    """An image classification set in three disjoint splits, decoded or on disk."""

    name: str
    classes: int
    train: "Split | Records"
    validation: "Split | Records"
    test: "Split | Records"
    standardize: Standardize
    class_names: tuple[str, ...]


class Augment(NamedTuple):
    """Crops after padding by `pad` pixels (black, or mirrored), and left-right flips."""

    pad: int = 0
    flip: bool = False
    reflect: bool = False


PLAIN = Augment()


# From disk.


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation: float = 0.1,
    limit: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads an image classification set, into memory as uint8 if it fits there.

    A set with its own "validation" and "test" splits keeps them. Without "test", its
    "validation" is the test split, or else a fifth of "train", which is the same for
    every seed. Without "validation", a part of "train" is. Splits are cut by class.

    Args:
      name: "digits" (scikit-learn's, embedded), a path that ends in .npz, or a set of
        TensorFlow Datasets prepared as array_record: "mnist", "emnist/letters",
        "cifar10:3.0.2". An .npz file holds `image` (uint8, [n h w] or [n h w c]) and
        `label` (integers), and may hold `image_test`, `label_test` and `class_names`.
      data_dir: where prepared sets are; by default TFDS_DATA_DIR, or
        ~/tensorflow_datasets.
      validation: share of "train" that becomes the validation split, in (0, 1).
      limit: how many training examples are kept; a smaller limit keeps a subset of a
        larger one's. Validation, test and `standardize` do not depend on it.
      size: images are scaled and cut at the centre to size x size. None keeps them.
      seed: of the validation split and of the limit.

    Returns:
      A Dataset of numpy arrays; or, above IN_MEMORY, of Records, which stay on disk and
      are cut by per cent instead of by class. `standardize` is that of "train" before `limit`, so
      that a student with few labels sees its teacher's inputs.

    >>> digits = load("digits", limit=500)
    >>> digits.train.image.shape, digits.validation.n, digits.test.n, digits.classes
    ((500, 8, 8, 1), 144, 359, 10)
    """
    if not 0 < validation < 1:
        do = "It is the share of train that is kept for choosing between runs."
        raise ValueError(message("load", "validation in (0, 1)", str(validation), do))
    if name == "digits":
        splits, names = _digits()
    elif name.endswith(".npz"):
        splits, names = _npz(Path(name).expanduser())
    else:
        splits, names = _tfds(name, data_dir, size)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if isinstance(splits["train"], Records):
        if sum(map(_nbytes, splits.values())) > IN_MEMORY:
            return _on_disk(splits, names, data_dir, size, validation, limit)
        splits = {key: split.read(range(split.n)) for key, split in splits.items()}
    if size is not None:
        splits = {key: _resized(split, size) for key, split in splits.items()}
    train = splits["train"]
    if "test" not in splits:
        # Not by `seed`: a student must never train on what its teacher is tested on.
        splits["test"], train = _carved("test", train, round(TEST * train.n), seed=0)
    if "validation" not in splits:
        count = round(validation * train.n)
        splits["validation"], train = _carved("validation", train, count, seed)
    standardize = statistics(train)
    if limit is not None:
        if not 0 < limit <= train.n:
            wanted = f"limit in 1..{train.n}, the size of train of {name!r}"
            raise ValueError(message("load", wanted, str(limit), "Lower it."))
        train = train.read(_stratified(train.label, limit, seed))
    for key, split in {**splits, "train": train}.items():
        if split.shape != train.shape:
            got = f"{train.shape} in train and {split.shape} in {key} of {name!r}"
            raise ValueError(message("load", _ONE_SHAPE, got, "Pass size=."))
    validation_split, test = splits["validation"], splits["test"]
    return Dataset(
        name, len(names), train, validation_split, test, standardize, tuple(names)
    )


def _digits() -> tuple[dict[str, Split], Sequence[str]]:
    bunch = _extra("sklearn.datasets").load_digits()
    image = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in bunch.target_names]
    return {"train": _checked("digits", image, bunch.target, len(names))}, names


def _npz(path: Path) -> tuple[dict[str, Split], Sequence[str]]:
    wanted = ("image", "label", "image_test", "label_test", "class_names")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in wanted if key in file.files}
            found = file.files
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        wanted = f"{path} to be an .npz file of plain arrays"
        raise ValueError(message("load", wanted, str(error), _SAVE)) from error
    pairs = {"train": ("image", "label")}
    if "image_test" in arrays or "label_test" in arrays:
        pairs["test"] = ("image_test", "label_test")
    missing = sorted({key for pair in pairs.values() for key in pair} - set(arrays))
    if missing:
        wanted = f"{path} to hold {' and '.join(missing)}"
        got = f"only {', '.join(sorted(found)) or 'nothing'}"
        raise ValueError(message("load", wanted, got, _SAVE))
    labels = np.concatenate([arrays[label].ravel() for _, label in pairs.values()])
    if "class_names" in arrays:
        names = [str(name) for name in arrays["class_names"].ravel()]
    elif np.issubdtype(labels.dtype, np.integer):
        # More classes than examples are stray labels, such as -1 kept as unsigned.
        names = [
            str(i) for i in range(min(int(labels.max(initial=0)) + 1, len(labels)))
        ]
    else:
        names = []  # `_checked` says what is wrong
    splits = {
        key: _checked(
            f"{image} of {path.name}", arrays[image], arrays[label], len(names)
        )
        for key, (image, label) in pairs.items()
    }
    return splits, names


def _tfds(
    name: str, data_dir: str | os.PathLike[str] | None, size: int | None
) -> tuple[dict[str, "Records"], Sequence[str]]:
    splits = {
        key: records(name, data_dir, key, size=size)
        for key in _builder(name, data_dir).info.splits
        if key in ("train", "validation", "test")
    }
    if "train" not in splits:
        do = "Read it by records(name, data_dir, split)."
        raise ValueError(message("load", f"a train split of {name!r}", "none", do))
    test = splits.get("test")
    if test is not None and test.labels([0])[0] < 0:
        del splits["test"]  # published without labels, as ImageNet's
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
        raise ValueError(message("load", wanted, str(limit), "Pass a smaller size=."))

    def part(of, where):
        return records(train.name, data_dir, f"{of}[{where}]", size=size)

    # By per cent of the file: TFDS shuffles when it prepares a set.
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


class Records:
    """One split of a prepared TFDS set, decoded when it is read. Made by `records`."""

    def __init__(self, name: str, split: str, builder: Any, size: int | None):
        tfds = importlib.import_module("tensorflow_datasets")
        features = dict(builder.info.features.items())
        keys = builder.info.supervised_keys or ("image", "label")
        image, label = (features.get(key) for key in (*keys, None, None)[:2])
        if not isinstance(image, tfds.features.Image) or not isinstance(
            label, tfds.features.ClassLabel
        ):
            wanted = "an image classification set (an image and a class label)"
            got = f"{name!r} with {', '.join(sorted(features))}"
            raise TypeError(message("records", wanted, got, _ARRAYS))
        if image.np_dtype != np.uint8 or image.shape[-1] not in _MODES:
            got = f"{np.dtype(image.np_dtype)} of {image.shape[-1]} in {name!r}"
            wanted = "uint8 images of 1, 3 or 4 channels"
            raise ValueError(message("records", wanted, got, _ARRAYS))
        # The bytes stay encoded here: Pillow decodes them in `read`, so that the same
        # pixels come out whether or not OpenCV, which TFDS prefers, is installed.
        encoded = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
        try:
            self._source = builder.as_data_source(
                split, decoders={key: tfds.decode.SkipDecoding() for key in encoded}
            )
        except NotImplementedError as error:
            wanted = f"{name!r} stored as array_record"
            got = f"{builder.info.file_format} in {builder.data_dir}"
            do = "Only TensorFlow reads that. " + _prepare(name, "another_data_dir")
            raise ValueError(message("records", wanted, got, do)) from error
        except ValueError as error:
            there = ", ".join(sorted(builder.info.splits))
            wanted = f"a split of {name!r} with examples ({there}, or a part of one)"
            raise ValueError(message("records", wanted, repr(split))) from error
        self.name, self.split, self.n = name, split, len(self._source)
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        self._keys, self._channels, self._size = keys, image.shape[-1], size
        self.shape = self._decode(0, self._source[0]).shape

    def labels(
        self, index: Sequence[int] | Integer[AnyArray, " batch"]
    ) -> Int32[np.ndarray, " batch"]:
        """The labels at these positions, without decoding an image."""
        key = self._keys[1]
        return np.array([example[key] for _, example in self._raw(index)], np.int32)

    def read(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> Split:
        """The examples at these positions, decoded.

        Without threads: on images of 28 to 256 pixels two threads decode no faster
        than one, because what they share is the interpreter.
        """
        images = np.empty((len(index), *self.shape), np.uint8)
        labels = np.empty(len(index), np.int32)
        for at, (i, example) in enumerate(self._raw(index)):
            image = self._decode(i, example)
            if image.shape != self.shape:
                got = f"{self.shape} and {image.shape} {self._where(i)}"
                raise ValueError(message("records", _ONE_SHAPE, got, "Pass size=."))
            images[at], labels[at] = image, example[self._keys[1]]
        _check_labels(f"{self.split!r} of {self.name!r}", labels, len(self.class_names))
        return Split(images, labels)

    def _raw(self, index: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        # In bulk, which is twice as fast as one by one, but never the whole set.
        index = np.asarray(index).tolist()
        for start in range(0, len(index), _CHUNK):
            part = index[start : start + _CHUNK]
            yield from zip(part, self._source.__getitems__(part), strict=True)

    def _decode(self, i: int, example: Mapping[str, Any]) -> np.ndarray:
        try:
            with _pillow().open(io.BytesIO(example[self._keys[0]])) as image:
                if image.mode != _MODES[self._channels]:
                    image = image.convert(_MODES[self._channels])
                if self._size is not None:
                    image = _fit(image, self._size)
                pixels = np.asarray(image)
        except (OSError, SyntaxError) as error:  # Pillow raises both on broken files
            wanted = f"an image {self._where(i)}"
            do = "Prepare the set again."
            raise ValueError(message("records", wanted, str(error), do)) from error
        return pixels.reshape(*pixels.shape[:2], self._channels)

    def _where(self, i: int) -> str:
        return f"in example {i} of {self.split!r} of {self.name!r}"


def records(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    size: int | None = None,
) -> Records:
    """Opens one split of a prepared TFDS set without decoding it.

    Args:
      name: as for `load`, a TFDS name.
      data_dir: as for `load`.
      split: a split or a part of one: "train", "train[:90%]", "train[90%:]".
      size: images are scaled and cut at the centre to size x size. Sets whose images
        differ in shape need it.

    Returns:
      Records with `n`, `shape`, `class_names` and `read(index)`, for `stream`,
      `statistics`, `evaluation_batches` and `fits_on_device`.
    """
    return Records(name, split, _builder(name, data_dir), size)


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    # tfds.builder(name) may ask the network about a set that is not prepared,
    # and insists on its own version of one that is: what is on disk decides instead.
    tfds = importlib.import_module("tensorflow_datasets")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_dir = Path(data_dir or default).expanduser()
    base, _, version = name.partition(":")
    versions = {
        tuple(map(int, path.parent.name.split("."))): path.parent
        for path in (data_dir / base).glob("*/features.json")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    }
    matching = [v for v, path in versions.items() if path.match(version or "*")]
    if matching:
        return tfds.builder_from_directory(versions[max(matching)])
    configs = {path.parts[-3] for path in (data_dir / base).glob("*/*/features.json")}
    if configs:
        wanted = f"one configuration of {name!r}"
        got = f"a folder with {', '.join(sorted(configs))}"
        do = f"Write {base}/{min(configs)}."
        raise ValueError(message("load", wanted, got, do))
    known = tfds.list_builders(with_community_datasets=False)
    if versions or base.split("/")[0] in known:
        there = ", ".join(path.name for path in versions.values()) or "nothing"
        wanted = f"{name!r} prepared in {data_dir}"
        do = _prepare(name, data_dir)
        raise ValueError(message("load", wanted, f"{there} there", do))
    prepared = {path.parts[-3] for path in data_dir.glob("*/*/features.json")}
    near = ", ".join(nearest(base, sorted({"digits", *prepared, *known})))
    got = f"{name!r}, neither in {data_dir} nor known to TensorFlow Datasets"
    do = f"The nearest names are {near}."
    raise ValueError(message("load", "the name of a dataset", got, do))


def _prepare(name: str, data_dir: str | os.PathLike[str]) -> str:
    return (
        "Prepare it once, with TensorFlow (pip install tensorflow) and a network: "
        f"tfds.builder({name!r}, data_dir={str(data_dir)!r})"
        '.download_and_prepare(file_format="array_record").'
    )


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        do = "Run pip install 'hintjax[data]'."
        text = message("hintjax.data", f"{module} installed", "no such module", do)
        raise ImportError(text) from error


def _pillow() -> Any:
    return _extra("PIL.Image")


def _fit(image: Any, size: int) -> Any:
    bilinear = _pillow().Resampling.BILINEAR
    return _extra("PIL.ImageOps").fit(image, (size, size), method=bilinear)


def _resized(split: Split, size: int) -> Split:
    if split.shape[:2] == (size, size):
        return split
    if split.n * size * size * split.shape[-1] > IN_MEMORY:
        wanted = f"a size at which {split.n} images fit into {IN_MEMORY} bytes"
        raise ValueError(message("load", wanted, str(size), "Lower it."))
    if split.shape[-1] not in _MODES:
        wanted = "images of 1, 3 or 4 channels to resize"
        do = "Leave size= out."
        raise ValueError(message("load", wanted, str(split.shape), do))
    channels = split.shape[-1]
    flat = split.image[..., 0] if channels == 1 else split.image
    image = np.stack([_fit(_pillow().fromarray(one), size) for one in flat])
    return split._replace(image=image.reshape(-1, size, size, channels))


# Splits.


def _checked(where: str, image: np.ndarray, label: np.ndarray, classes: int) -> Split:
    if image.dtype != np.uint8:
        do = "Scale them to 0..255, round them and convert them."
        wanted = f"uint8 pixels in {where}"
        raise TypeError(message("load", wanted, str(image.dtype), do))
    if image.ndim not in (3, 4) or label.shape != image.shape[:1]:
        wanted = f"images [n h w] or [n h w c] and labels [n] in {where}"
        got = f"{image.shape} and {label.shape}"
        raise ValueError(message("load", wanted, got, "Reshape them."))
    if not label.size:
        wanted = f"at least one example in {where}"
        raise ValueError(message("load", wanted, "an empty split"))
    _check_labels(where, label, classes)
    image = image[..., None] if image.ndim == 3 else image
    return Split(image, label.astype(np.int32))


def _check_labels(where: str, label: np.ndarray, classes: int) -> None:
    if not np.issubdtype(label.dtype, np.integer):
        wanted = f"integer labels in {where}"
        raise TypeError(message("load", wanted, str(label.dtype), "Convert them."))
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if wrong.size:
        wanted = f"labels in 0..{classes - 1} in {where}"
        got = (
            f"{label[wrong[0]]} at {wrong[0]} ({wrong.size} of {label.size} are wrong)"
        )
        raise ValueError(message("load", wanted, got, "Correct them."))


def _stratified(label: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted positions of `count` examples, each class by its share, rounded."""
    # RandomState, not Generator: its numbers are the same in every release of numpy.
    shuffled = np.random.RandomState(seed).permutation(len(label))
    # The k-th example of a class of m comes at (k + 1/2) / m. The first `count` of all
    # then hold round(m * share) of each class, and contain those of any smaller count.
    at = np.empty(len(label))
    for one in np.unique(label):
        members = np.flatnonzero(label[shuffled] == one)
        at[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(shuffled[np.argsort(at, kind="stable")[:count]])


def _carved(name: str, split: Split, count: int, seed: int) -> tuple[Split, Split]:
    if not 0 < count < split.n:
        wanted = f"at least one example in {name} and in train"
        got = f"{count} and {split.n - count}"
        raise ValueError(message("load", wanted, got, "The set is too small to cut."))
    chosen = _stratified(split.label, count, seed)
    rest = np.setdiff1d(np.arange(split.n), chosen)
    return split.read(chosen), split.read(rest)


def statistics(source: Split | Records, *, sample: int = 4096) -> Standardize:
    """Mean and standard deviation of each channel, of pixels in [0, 1].

    Args:
      source: the training split. Records are sampled, a Split is counted whole.
      sample: how many Records, evenly spaced, are decoded.

    Returns:
      Standardize. A channel that never changes has 1/255, so that it becomes 0.

    >>> image = np.zeros((2, 1, 1, 1), np.uint8)
    >>> image[1] = 255
    >>> statistics(Split(image, np.zeros(2, np.int32)))
    Standardize(mean=array([0.5], dtype=float32), std=array([0.5], dtype=float32))
    """
    if isinstance(source, Records):
        at = np.linspace(0, source.n - 1, min(sample, source.n)).astype(int)
        source = source.read(at)
    # Counting the 256 values is exact, and four times faster than summing floats.
    counts = np.zeros((source.shape[-1], 256))
    for start in range(0, source.n, _CHUNK):
        chunk = source.image[start : start + _CHUNK]
        for channel, count in enumerate(counts):
            count += np.bincount(chunk[..., channel].ravel(), minlength=256)
    value = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ value
    std = np.sqrt(np.maximum(share @ value**2 - mean**2, 0.0))
    std = np.where(std > 1e-6, std, 1 / 255)
    return Standardize(mean.astype(np.float32), std.astype(np.float32))


def _nbytes(source: Split | Records) -> int:
    return source.n * int(np.prod(source.shape))


def fits_on_device(*sources: Split | Records, limit: int = ON_DEVICE) -> bool:
    """Whether these splits, decoded to uint8, take at most `limit` bytes together."""
    return sum(map(_nbytes, sources)) <= limit


# On the device.


def place(
    split: Split, device: jax.Device | jax.sharding.Sharding | None = None
) -> Placed:
    """Puts a split on the device, or on all devices of a (replicated) sharding.

    One row per image, because a TPU keeps [n h w c] with n innermost: gathering from
    that first copies the whole set, at every step (four times CIFAR-10's 154 MB).
    """
    pixels = split.image.reshape(split.n, -1)
    if isinstance(device, jax.sharding.Sharding):
        pixels, label = spread((pixels, split.label), device)
    else:
        pixels, label = jax.device_put((pixels, split.label), device)
    return Placed(pixels, label, split.shape)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """How many whole batches one epoch has; what is left over waits for the next order.

    >>> steps_per_epoch(1293, 64)
    20
    """
    if not 0 < batch_size <= n:
        wanted = f"batch_size in 1..{n}, the size of the split"
        do = "Change the batch size, or keep more examples (limit=)."
        raise ValueError(message("steps_per_epoch", wanted, str(batch_size), do))
    return n // batch_size


@partial(jax.jit, static_argnums=1)
def order(key: PRNGKeyArray, n: int) -> Int32[Array, " n"]:
    """The order of one epoch: call it once per epoch, on fold_in(key, epoch)."""
    return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))


def take(
    split: Placed | Split,
    index: Integer[AnyArray, " batch"],
    standardize: Standardize,
    *,
    key: PRNGKeyArray | None = None,
    augment: Augment = PLAIN,
) -> dict[str, Array]:
    """Cuts one batch out of a split that is on the device; to be called inside jit.

    image = (augmented / 255 - mean) / std

    Args:
      split: by `place`. An argument of the jitted function: a constant there would be
        compiled into it.
      index: positions in the split, such as a part of `order`.
      standardize: of the training split, for every split.
      key: of this step; needed when `augment` does anything.
      augment: a Python constant.

    Returns:
      {"image": float32 [batch h w c], "label": int32 [batch], "index": int32 [batch]}

    >>> split = Split(np.zeros((9, 4, 4, 1), np.uint8), np.arange(9, dtype=np.int32))
    >>> batch = jax.jit(take)(place(split), jnp.array([3, 5]), statistics(split))
    >>> batch["image"].shape, batch["label"].tolist()
    ((2, 4, 4, 1), [3, 5])
    """
    index = jnp.asarray(index, jnp.int32)
    image, label = split.read(index)
    if augment.pad or augment.flip:
        if key is None:
            do = "Pass key=, a new one at every step."
            raise ValueError(message("take", f"a key for {augment}", "None", do))
        shift_key, flip_key = jax.random.split(key)
        n, end = len(index), 2 * augment.pad + 1
        shift = jax.random.randint(shift_key, (n, 2), 0, end, jnp.int32)
        flip = jax.random.bernoulli(flip_key, 0.5, (n,))
        image = _augmented(jnp, image, shift, flip, augment)
    image = _standardized(jnp, image, standardize)
    return {"image": image, "label": label, "index": index}


def _augmented(xp: Any, image: Any, shift: Any, flip: Any, augment: Augment) -> Any:
    """Crops and flips by index, with jax.numpy and numpy alike."""
    # One gather of rows, one of columns, the flip within it: on two CPU cores ten times
    # faster than a select of reversed images, which XLA fuses into the gathers.
    height, width = image.shape[1:3]
    rows = _crop_index(xp, shift[:, 0], height, augment)[:, :, None, None]
    columns = _crop_index(xp, shift[:, 1], width, augment)
    if augment.flip:
        columns = xp.where(flip[:, None], columns[:, ::-1], columns)
    columns = columns[:, None, :, None]
    if augment.pad:
        image = xp.take_along_axis(image, xp.clip(rows, 0, height - 1), axis=1)
    image = xp.take_along_axis(image, xp.clip(columns, 0, width - 1), axis=2)
    if augment.pad and not augment.reflect:
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        image = xp.where(inside, image, xp.zeros_like(image))
    return image


def _crop_index(xp: Any, shift: Any, length: int, augment: Augment) -> Any:
    if augment.reflect and augment.pad >= length:
        wanted = f"a reflecting pad below the image's {length} pixels"
        raise ValueError(message("take", wanted, str(augment.pad), "Lower it."))
    index = shift[:, None] + xp.arange(length, dtype=xp.int32) - augment.pad
    if augment.reflect:  # -1 reads 1, and length reads length - 2
        index = length - 1 - xp.abs(length - 1 - xp.abs(index))
    return index


def _standardized(xp: Any, image: Any, standardize: Standardize) -> Any:
    mean, std = (xp.asarray(x, dtype=xp.float32) for x in standardize)
    return (image.astype(xp.float32) / xp.float32(255) - mean) / std


# Evaluation, and sets that do not fit.


def evaluation_batches(
    source: Placed | Split | Records, batch_size: int, standardize: Standardize
) -> Iterator[dict[str, Array | np.ndarray]]:
    """Every example once, in order, in batches of one shape.

    Args:
      source: a split, on the device or on the host, or Records.
      batch_size: may be larger than the split.
      standardize: of the training split.

    Yields:
      Batches as `take` gives them, with "where" (bool [batch]). The last batch is
      filled with repeats of the last example, where "where" is False.
    """
    if batch_size < 1 or not source.n:
        wanted = "a batch size above 0 and a split with examples"
        got = f"{batch_size} and {source.n}"
        raise ValueError(message("evaluation_batches", wanted, got))
    for start in range(0, source.n, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        where = index < source.n
        index = np.minimum(index, source.n - 1)
        if isinstance(source, Placed):
            batch = _taken(source, index, standardize)
        else:
            split = source.read(index)
            batch = _taken(split, np.arange(batch_size), standardize)
        yield {**batch, "index": index, "where": where}


_taken = jax.jit(take)


def stream(
    source: Split | Records,
    batch_size: int,
    standardize: Standardize,
    *,
    augment: Augment = PLAIN,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches of a set that does not fit on the device, by Grain.

    The examples form one sequence, in a new order each epoch and each example once per
    epoch; a batch may reach over the end of an epoch. Process p of P takes the p-th part
    of every batch, so that the processes' batches together are the same batches, with
    the same crops and flips, whatever P is, and so is the position in them.

    Args:
      source: Records, or a Split on the host.
      batch_size: of this process.
      standardize: of the training split.
      augment: as for `take`, drawn and done in numpy.
      seed: of the order, the crops and the flips.
      process_index: this process, as jax.process_index().
      process_count: of all processes.
      workers: how many worker processes decode; the batches do not depend on it. The
        program then has to start under `if __name__ == "__main__":`. 0 decodes in a
        background thread.

    Returns:
      Grain's iterator of batches as `take` gives them, of numpy arrays. Its
      `get_state()` is plain JSON; `set_state` of an equal stream continues from there.
      `close()` ends its workers.
    """
    steps_per_epoch(source.n, batch_size * process_count)  # raises
    if not 0 <= process_index < process_count:
        wanted = f"process_index in 0..{process_count - 1}"
        do = "Pass jax.process_index() and jax.process_count()."
        raise ValueError(message("stream", wanted, str(process_index), do))
    grain = _extra("grain")
    standardize = Standardize(*map(np.asarray, standardize))  # workers have no device
    if isinstance(source, Split):
        source = Split(*map(np.asarray, source))
    # Grain carries positions; a batch is read in one go, which is twice as fast as
    # example by example. Crops are drawn before the split by process.
    positions = grain.MapDataset.range(source.n).seed(seed).shuffle().repeat()
    drawn = positions.random_map(partial(_drawn, augment=augment))
    part = _Part(drawn, batch_size, process_index, process_count)
    batches = grain.MapDataset.source(part).batch(batch_size)
    batches = batches.map(partial(_read, source, standardize, augment))
    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    ready = batches.to_iter_dataset(threads)
    if workers:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # Grain's workers read absl's flags
            flags.mark_as_parsed()
        ready = ready.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(ready)


class _Part:
    """What one process reads of an endless sequence of batches, by position."""

    def __init__(self, drawn: Any, size: int, process: int, processes: int):
        self._drawn, self._size = drawn, size
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        # Endless, but for what still fits when Grain and `drawn` count in examples.
        return sys.maxsize // self._processes // 2

    def __getitem__(self, at: SupportsIndex) -> dict[str, Any]:
        batch, i = divmod(operator.index(at), self._size)
        return self._drawn[(batch * self._processes + self._process) * self._size + i]


def _drawn(
    index: int, random: np.random.Generator, *, augment: Augment
) -> dict[str, Any]:
    end = 2 * augment.pad + 1
    *shift, flip = random.integers(0, (end, end, 2))
    return {"index": np.int32(index), "shift": np.array(shift), "flip": flip == 1}


def _read(
    source: Split | Records,
    standardize: Standardize,
    augment: Augment,
    drawn: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    image, label = source.read(drawn["index"])
    if augment.pad or augment.flip:
        image = _augmented(np, image, drawn["shift"], drawn["flip"], augment)
    image = _standardized(np, image, standardize)
    return {"image": image, "label": label, "index": drawn["index"]}
