"""Images from disk to the device, as batches.

`load` reads a dataset from disk: its training, validation and test splits. A split that
fits on the device is put there once by `place`, and `take` cuts batches out of it
inside jit, in the `order` of each epoch. `stream` reads batches of a larger split on
the host. `fixed_views` draws a finite number of crops and flips per example.
`statistics` measures the numbers of `Standardize`; `evaluation_batches` reads
a split once. Labels are classes, or the labels of another task (`targets`).
"""

from hintjax.data.batches import evaluation_batches, order, place, steps_per_epoch, take
from hintjax.data.files import Files, Source
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
from hintjax.data.views import View, fixed_views, view_of

__all__ = [
    "IN_MEMORY",
    "ON_DEVICE",
    "PLAIN",
    "TEST",
    "AnyArray",
    "Augment",
    "Dataset",
    "Files",
    "Placed",
    "Records",
    "Source",
    "Split",
    "Standardize",
    "View",
    "evaluation_batches",
    "fits_on_device",
    "fixed_views",
    "load",
    "order",
    "place",
    "records",
    "statistics",
    "steps_per_epoch",
    "stream",
    "take",
    "view_of",
]
