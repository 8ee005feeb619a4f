"""Images on the host and on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Integer, Num, UInt8

AnyArray = Array | np.ndarray
UNLABELED = -1  # label of an example whose class is not known


class Split(NamedTuple):
    """The decoded images and labels of one split, on the host."""

    image: UInt8[AnyArray, "n h w c"]
    label: Num[AnyArray, "n ..."]

    @property
    def n(self) -> int:
        """The number of examples."""
        return self.image.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, [h w c]."""
        return self.image.shape[1:]

    def read(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> "Split":
        """The examples at these positions."""
        return Split(self.image[index], self.label[index])

    def part(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> "Split":
        """The split of the examples at these positions; the same as `read`."""
        return self.read(index)

    def labels(self, index: Sequence[int] | Integer[AnyArray, " batch"]) -> AnyArray:
        """The labels at these positions, without the images."""
        return self.label[index]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("pixels", "label"),
    meta_fields=("shape",),
)
@dataclass(frozen=True)
class Placed:
    """A Split on the device, one row per image. Made by `place`.

    Attributes:
        pixels: uint8 array (n, pixels). JAX puts shapes here while it lowers a program.
        label: array (n, ...), likewise.
        shape: height, width and channels of an image.
    """

    pixels: Any
    label: Any
    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        """The number of examples."""
        return self.pixels.shape[0]

    def read(self, index: Integer[AnyArray, " batch"]) -> Split:
        """The examples at these positions."""
        image = self.pixels[index].reshape(-1, *self.shape)
        return Split(image, self.label[index])


class Standardize(NamedTuple):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: Float32[AnyArray, " c"]
    std: Float32[AnyArray, " c"]


class Augment(NamedTuple):
    """Crops after padding by `pad` pixels (black or mirrored), and left-right flips."""

    pad: int = 0
    flip: bool = False
    reflect: bool = False


PLAIN = Augment()
