"""Images from disk to the device, as batches."""

from hintjax.data.batches import evaluation_batches, order, place, steps_per_epoch, take
from hintjax.data.images import PLAIN, AnyArray, Augment, Placed, Split, Standardize
from hintjax.data.records import Records, records
from hintjax.data.sources import (
    IN_MEMORY,
    ON_DEVICE,
    TEST,
    Dataset,
    fits_on_device,
    load,
)
from hintjax.data.standardize import statistics
from hintjax.data.stream import stream

__all__ = [
    "IN_MEMORY",
    "ON_DEVICE",
    "PLAIN",
    "TEST",
    "AnyArray",
    "Augment",
    "Dataset",
    "Placed",
    "Records",
    "Split",
    "Standardize",
    "evaluation_batches",
    "fits_on_device",
    "load",
    "order",
    "place",
    "records",
    "statistics",
    "steps_per_epoch",
    "stream",
    "take",
]
