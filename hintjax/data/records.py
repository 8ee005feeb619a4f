"""A prepared TensorFlow Datasets split, decoded when it is read."""

import importlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from hintjax._checks import Refusal, WrongType, message, nearest
from hintjax.data.images import AnyArray, Split
from hintjax.data.splits import check_labels

CHUNK = 1024  # images decoded or counted at a time
ONE_SHAPE = "images of one shape"
_ARRAYS = "Write its arrays to an .npz file."
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Records:
    """One split of a prepared TFDS set, decoded when it is read. Made by `records`."""

    def __init__(self, name: str, split: str, builder: Any, size: int | None) -> None:
        tfds = importlib.import_module("tensorflow_datasets")
        features = dict(builder.info.features.items())
        keys = builder.info.supervised_keys or ("image", "label")
        found: list[Any] = [features.get(key) for key in (*keys, None, None)[:2]]
        kinds = tfds.features.Image, tfds.features.ClassLabel
        if not all(map(isinstance, found, kinds)):
            wanted = "an image classification set (an image and a class label)"
            got = f"{name!r} with {', '.join(sorted(features))}"
            raise WrongType(message("records", wanted, got, _ARRAYS))
        image, label = found
        if image.np_dtype != np.uint8 or image.shape[-1] not in MODES:
            got = f"{np.dtype(image.np_dtype)} of {image.shape[-1]} in {name!r}"
            wanted = "uint8 images of 1, 3 or 4 channels"
            raise Refusal(message("records", wanted, got, _ARRAYS))
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
            raise Refusal(message("records", wanted, got, do)) from error
        except ValueError as error:
            there = ", ".join(sorted(builder.info.splits))
            wanted = f"a split of {name!r} with examples ({there}, or a part of one)"
            raise Refusal(message("records", wanted, repr(split))) from error
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
        than one, because they share the interpreter.
        """
        images = np.empty((len(index), *self.shape), np.uint8)
        labels = np.empty(len(index), np.int32)
        for at, (i, example) in enumerate(self._raw(index)):
            image = self._decode(i, example)
            if image.shape != self.shape:
                got = f"{self.shape} and {image.shape} {self._where(i)}"
                raise Refusal(message("records", ONE_SHAPE, got, "Pass size=."))
            images[at], labels[at] = image, example[self._keys[1]]
        check_labels(f"{self.split!r} of {self.name!r}", labels, len(self.class_names))
        return Split(images, labels)

    def _raw(self, index: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each position with its example, not yet decoded."""
        # In bulk, which is twice as fast as one by one, but never the whole set.
        index = np.asarray(index).tolist()
        for start in range(0, len(index), CHUNK):
            part = index[start : start + CHUNK]
            yield from zip(part, self._source.__getitems__(part), strict=True)

    def _decode(self, i: int, example: Mapping[str, Any]) -> np.ndarray:
        """The pixels of one example, [h w c]."""
        try:
            with pillow().open(io.BytesIO(example[self._keys[0]])) as image:
                if image.mode != MODES[self._channels]:
                    image = image.convert(MODES[self._channels])
                if self._size is not None:
                    image = cropped(image, self._size)
                pixels = np.asarray(image)
        except (OSError, SyntaxError) as error:  # Pillow raises both on broken files
            wanted = f"an image {self._where(i)}"
            do = "Prepare the set again."
            raise Refusal(message("records", wanted, str(error), do)) from error
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
      size: images are scaled and cropped at the center to size x size. Required if
        the images differ in shape.

    Returns:
      Records with `n`, `shape`, `class_names` and `read(index)`, for `stream`,
      `statistics`, `evaluation_batches` and `fits_on_device`.
    """
    return Records(name, split, builder_of(name, data_dir), size)


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """The directory with prepared sets."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(data_dir or default).expanduser()


def folder_of(name: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder of images that a name means; None for the name of a prepared set."""
    path = Path(name).expanduser()
    prepared = _data_dir(data_dir) / name.partition(":")[0]
    sets = any(path.glob("*/features.json")) or any(path.glob("*/*/features.json"))
    a_path = path.is_absolute() or name.startswith(".")
    if not path.is_dir() or sets or (prepared.is_dir() and not a_path):
        return None
    return path


def builder_of(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """The TFDS builder of a dataset that is prepared on disk."""
    # tfds.builder(name) may ask the network about a set that is not prepared,
    # and insists on its own version of a prepared one: here the disk decides.
    tfds = importlib.import_module("tensorflow_datasets")
    data_dir = _data_dir(data_dir)
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
        raise Refusal(message("load", wanted, got, do))
    known = tfds.list_builders(with_community_datasets=False)
    if versions or base.split("/")[0] in known:
        there = ", ".join(path.name for path in versions.values()) or "nothing"
        wanted = f"{name!r} prepared in {data_dir}"
        do = _prepare(name, data_dir)
        raise Refusal(message("load", wanted, f"{there} there", do))
    prepared = {path.parts[-3] for path in data_dir.glob("*/*/features.json")}
    near = ", ".join(nearest(base, sorted({"digits", *prepared, *known})))
    got = f"{name!r}, neither in {data_dir} nor known to TensorFlow Datasets"
    do = f"The nearest names are {near}."
    if Path(name).expanduser().exists():
        do = "A file is read if it was written by numpy.savez and ends in .npz."
    raise Refusal(message("load", "the name of a dataset", got, do))


def _prepare(name: str, data_dir: str | os.PathLike[str]) -> str:
    """The advice how to prepare a dataset."""
    return (
        "Prepare it once, with TensorFlow (pip install tensorflow) and a network: "
        f"tfds.builder({name!r}, data_dir={str(data_dir)!r})"
        '.download_and_prepare(file_format="array_record").'
    )


def optional_module(module: str) -> Any:
    """Imports a module of the extra `data`, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        do = "Run pip install 'hintjax[data]'."
        text = message("hintjax.data", f"{module} installed", "no such module", do)
        raise ImportError(text) from error


def pillow() -> Any:
    """The module PIL.Image."""
    return optional_module("PIL.Image")


def cropped(image: Any, size: int) -> Any:
    """A Pillow image, scaled and cropped at the center to size x size."""
    bilinear = pillow().Resampling.BILINEAR
    return optional_module("PIL.ImageOps").fit(image, (size, size), method=bilinear)
