"""Batches that do not fit on the device, read ahead by Grain."""

import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from hintjax._checks import Refusal, message
from hintjax.data.batches import augmented, fixed, steps_per_epoch
from hintjax.data.files import Source
from hintjax.data.images import PLAIN, Augment, Split, Standardize
from hintjax.data.records import optional_module
from hintjax.data.standardize import standardized


def stream(
    source: Source,
    batch_size: int,
    standardize: Standardize,
    *,
    augment: Augment = PLAIN,
    crops: UInt8[np.ndarray, "views n 3"] | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches of a split that does not fit on the device, by Grain.

    The examples form one sequence, with a new order each epoch and each example once
    per epoch; a batch may span the end of an epoch. Process p of P takes the p-th part
    of every batch. So the batches of all processes together, their crops and flips, and
    the position in the sequence do not depend on P.

    Args:
      source: a split on the host or on disk.
      batch_size: the number of examples per batch in this process.
      standardize: the statistics of the training split.
      augment: as for `take`, computed in numpy.
      crops: the result of `fixed_views`: epoch e shows view e % views, and the batch
        holds its number as "view". By default crops and flips are random.
      seed: the seed of the order, the crops and the flips.
      process_index: the number of this process, as jax.process_index().
      process_count: the number of processes.
      workers: the number of worker processes that decode; the batches do not depend on
        it. With workers, the program must start under `if __name__ == "__main__":`.
        0 decodes in a background thread.

    Returns:
      Grain's iterator of batches as `take` returns them, with numpy arrays. Its
      `get_state()` is plain JSON; `set_state` of an equal stream continues from there.
      `close()` ends its workers.
    """
    steps_per_epoch(source.n, batch_size * process_count)  # raises
    if not 0 <= process_index < process_count:
        wanted = f"process_index in 0..{process_count - 1}"
        do = "Pass jax.process_index() and jax.process_count()."
        raise Refusal(message("stream", wanted, str(process_index), do))
    grain = optional_module("grain")
    standardize = Standardize(*map(np.asarray, standardize))  # workers have no device
    if isinstance(source, Split):
        source = Split(*map(np.asarray, source))
    # Grain carries positions; a batch is read in one go, twice as fast as
    # example by example. Crops are drawn before processes take their parts.
    positions = grain.MapDataset.range(source.n).seed(seed).shuffle().repeat()
    if crops is None:
        drawn = positions.random_map(partial(_drawn, augment=augment))
    else:
        drawn = positions.map_with_index(partial(_fixed, crops))
    part = _Part(drawn, batch_size, process_index, process_count)
    batches = grain.MapDataset.source(part).batch(batch_size)
    batches = batches.map(partial(_read, source, standardize, augment))
    ready = batches.to_iter_dataset(_ahead())
    if workers:
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():  # Grain's workers read absl's flags
            flags.mark_as_parsed()
        ready = ready.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(ready)


def read_ahead(read: Callable[[int], Any], start: int = 0) -> Any:
    """Calls read(start), read(start + 1), ... in a thread that is two results ahead.

    Args:
      read: `(number) -> batch`. What it raises, the iterator raises in its turn.
      start: the first number.

    Returns:
      Grain's iterator of the results, which never ends. `close()` ends its thread.
    """
    numbers = optional_module("grain").MapDataset.range(start, sys.maxsize)
    return iter(numbers.map(read).to_iter_dataset(_ahead()))


def _ahead() -> Any:
    """How Grain reads: in one thread, in order, two batches ahead."""
    options = optional_module("grain").ReadOptions
    return options(num_threads=1, prefetch_buffer_size=2)


class _Part:
    """The part of an endless sequence of batches that one process reads."""

    def __init__(self, drawn: Any, size: int, process: int, processes: int) -> None:
        self._drawn, self._size = drawn, size
        self._process, self._processes = process, processes

    def __len__(self) -> int:
        # Endless in effect; Grain and `drawn` count examples, and that number must fit.
        return sys.maxsize // self._processes // 2

    def __getitem__(self, at: SupportsIndex) -> dict[str, Any]:
        batch, i = divmod(operator.index(at), self._size)
        return self._drawn[(batch * self._processes + self._process) * self._size + i]


def _drawn(
    index: int, random: np.random.Generator, *, augment: Augment
) -> dict[str, Any]:
    """A position, with the random crop and flip of its example."""
    end = 2 * augment.pad + 1
    *shift, flip = random.integers(0, (end, end, 2))
    return {"index": np.int32(index), "shift": np.array(shift), "flip": flip == 1}


def _fixed(
    crops: UInt8[np.ndarray, "views n 3"], at: int, index: int
) -> dict[str, Any]:
    """A position, with the crop and flip that the view of its epoch has."""
    view = at // crops.shape[1] % crops.shape[0]
    (shift,), (flip,) = fixed(crops[view, index][None])
    number = np.int32(view)
    return {"index": np.int32(index), "shift": shift, "flip": flip, "view": number}


def _read(
    source: Source,
    standardize: Standardize,
    augment: Augment,
    drawn: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Reads, crops, flips and standardizes one batch."""
    image, label = source.read(drawn["index"])
    if augment.pad or augment.flip:
        image = augmented(np, image, drawn["shift"], drawn["flip"], augment)
    image = standardized(np, image, standardize)
    batch = {"image": image, "label": np.asarray(label), "index": drawn["index"]}
    return batch | ({"view": drawn["view"]} if "view" in drawn else {})
