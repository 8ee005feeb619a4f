"""A reader of safetensors files: no pickle, no execution, everything checked."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hintjax._checks import FileRefusal, Refusal, message

# Names of the file format; its bytes are little-endian.
DTYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "BF16": jnp.bfloat16,
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
AGAIN = "Fetch or convert the file again."
CONVERT = (
    "Where torch is installed, convert it: import torch, safetensors.torch; "
    "safetensors.torch.save_file(torch.load({0!r}, map_location='cpu', "
    "weights_only=True), {1!r})."
)
Entry = tuple[Any, list[int], int, int]  # dtype, shape, begin, end
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file by name; nothing in the file is executed.

    The format: 8 bytes with the header's length, the header in JSON (name -> dtype,
    shape and offsets), the data. The whole header is checked against the file.

    Args:
        path: path of the file.

    Returns:
        The arrays of the file, read-only, with the dtypes and layout of torch.

    Raises:
        FileRefusal: if the file cannot be read.
        Refusal: if the file is a pickle or damaged.

    References:
        huggingface/safetensors, README.md: Format.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        wanted = f"a file {path} that can be read"
        text = message("read_safetensors", wanted, f"{error}")
        raise FileRefusal(text) from None
    if _pickled(path, content):
        wanted, got = "a safetensors file", "a pickle, which can run any code when read"
        do = CONVERT.format(path.name, f"{path.stem}.safetensors")
        raise _error(path, wanted, got, do)
    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, LONGEST_HEADER):
        got = f"one of {length} bytes in a file of {len(content)}"
        raise _error(path, "a header within the file", got)
    start = 8 + length
    entries = _header(path, content[8:start])
    _check_offsets(path, entries, len(content) - start)
    tensors = {}
    for name, (dtype, shape, begin, _) in entries.items():
        flat = np.frombuffer(content, dtype, math.prod(shape), start + begin)
        tensors[name] = flat.reshape(shape)
    return tensors


def _pickled(path: Path, content: bytes) -> bool:
    """Whether a file is a pickle, zipped or not."""
    # A safetensors file can begin with the same bytes (the length of its header), but
    # then zeros follow; neither kind of pickle has zeros there.
    zipped = content[:4] == b"PK\x03\x04" and any(content[4:8])
    pickled = re.match(rb"\x80[\x02-\x05]", content) and any(content[2:8])
    return path.suffix.lower() in PICKLES or zipped or bool(pickled)


def _header(path: Path, text: bytes) -> dict[str, Entry]:
    """The entries of the header by name; each entry is consistent in itself."""
    wanted = "a header in JSON, without repeated names"
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _error(path, wanted, f"{error}") from error
    if not isinstance(header, dict):
        raise _error(path, "a JSON object as its header", type(header).__name__)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, value) for name, value in header.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; raises a plain error if a name is repeated."""
    entries = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name!r} twice")
        entries[name] = value
    return entries


def _entry(path: Path, name: str, entry: Any) -> Entry:
    """One entry of the header, checked."""
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
        case _:
            kind, shape, begin, end = "", [], 0, 0
            numbers = [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        wanted = f"dtype, shape and data_offsets of {name!r} (numbers >= 0)"
        raise _error(path, wanted, f"{entry}")
    if kind not in DTYPES:
        wanted = f"{name!r} to be one of {', '.join(DTYPES)}"
        raise _error(path, wanted, kind, "Convert the tensor where the file was made.")
    size = math.prod(shape) * np.dtype(DTYPES[kind]).itemsize
    if end - begin != size:
        wanted = f"{name!r} to have {size} bytes ({kind} {shape})"
        raise _error(path, wanted, f"{end - begin}")
    return DTYPES[kind], shape, begin, end


def _check_offsets(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Raises unless every byte of the data belongs to exactly one tensor."""
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        _, _, begin, end = entry
        if begin != position:
            wanted = f"{name!r} to begin where {before} ends, at {position}"
            raise _error(path, wanted, f"{begin}")
        position, before = end, f"{name!r}"
    if position != size:
        raise _error(path, f"{position} bytes of data", f"{size}")


def _error(path: Path, wanted: str, got: str, do: str = AGAIN) -> Refusal:
    """The error of a file that cannot be read."""
    return Refusal(message(f"read_safetensors: {path.name}", wanted, got, do))
