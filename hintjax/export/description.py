"""The description of a network inside its file: classes, preprocessing, shapes.

A zip archive with the description stands behind the bytes of the network, where the
readers of such files do not look. So `unzip -p student.tflite about.json` prints it.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

NAME = "about.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip archive has a date, and equal runs equal bytes


def described_as(about: Mapping[str, Any]) -> str:
    """A description as JSON, the same text for the same description."""
    return json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False)


def with_description(network: bytes, about: Mapping[str, Any]) -> bytes:
    """The bytes of a network with its description behind them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(NAME, _EPOCH), described_as(about))
    return network + file.getvalue()


def description(data: bytes) -> dict[str, Any]:
    """The description in the bytes of `stablehlo` or `tflite`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return json.loads(archive.read(NAME))


def without_description(data: bytes) -> bytes:
    """The bytes of a network alone, of which a microcontroller needs no more."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (entry,) = archive.infolist()
        return data[: entry.header_offset]
