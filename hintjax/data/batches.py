"""Batches cut out of a split inside jit."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Integer, PRNGKeyArray

from hintjax._checks import Refusal, message
from hintjax.data.files import Source
from hintjax.data.images import PLAIN, AnyArray, Augment, Placed, Split, Standardize
from hintjax.data.standardize import standardized
from hintjax.data.views import View
from hintjax.sharding import Device, spread


def place(split: Split, device: Device | jax.sharding.Sharding | None = None) -> Placed:
    """Puts a split on the device, or on all devices of a (replicated) sharding.

    The device keeps one row per image. A TPU would keep [n h w c] with n innermost, and
    a gather would first copy the whole split at every step (four times CIFAR-10's
    154 MB).
    """
    pixels = split.image.reshape(split.n, -1)
    if isinstance(device, jax.sharding.Sharding):
        pixels, label = spread((pixels, split.label), device)
    else:
        pixels, label = jax.device_put((pixels, split.label), device)
    return Placed(pixels, label, split.shape)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The number of whole batches in one epoch; the rest waits for the next epoch.

    >>> steps_per_epoch(1293, 64)
    20
    """
    if not 0 < batch_size <= n:
        wanted = f"batch_size in 1..{n}, the size of the split"
        do = "Change the batch size, or keep more examples (limit=)."
        raise Refusal(message("steps_per_epoch", wanted, str(batch_size), do))
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
    view: View | None = None,
) -> dict[str, Array]:
    """Cuts one batch out of a split that is on the device; to be called inside jit.

    image = (augmented / 255 - mean) / std

    Args:
      split: made by `place`. Pass it as an argument to the jitted function: a constant
        would be compiled into it.
      index: positions in the split, such as a part of `order`.
      standardize: the statistics of the training split, for every split.
      key: the random key of this step; needed when `augment` crops or flips and there
        is no view.
      augment: a Python constant.
      view: the fixed crops and flips of the whole split, instead of random ones.

    Returns:
      {"image": float32 [batch h w c], "label": int32 [batch], "index": int32 [batch]},
      and the number of the view as "view" (int32 [batch]) if there is one. For other
      tasks the labels are those of `hintjax.data.targets`.

    >>> from hintjax.data import statistics
    >>> split = Split(np.zeros((9, 4, 4, 1), np.uint8), np.arange(9, dtype=np.int32))
    >>> batch = jax.jit(take)(place(split), jnp.array([3, 5]), statistics(split))
    >>> batch["image"].shape, batch["label"].tolist()
    ((2, 4, 4, 1), [3, 5])
    """
    index = jnp.asarray(index, jnp.int32)
    image, label = split.read(index)
    batch = {"image": image, "label": jnp.asarray(label), "index": index}
    return shown(batch, standardize, key=key, augment=augment, view=view)


def shown(
    batch: Mapping[str, Any],
    standardize: Standardize,
    *,
    key: PRNGKeyArray | None = None,
    augment: Augment = PLAIN,
    view: View | None = None,
) -> dict[str, Any]:
    """Crops, flips and standardizes a batch that was read; to be called inside jit.

    Args:
      batch: uint8 images, "label" and "index" of each example, and other entries.
      standardize: as for `take`.
      key: as for `take`.
      augment: as for `take`.
      view: as for `take`.

    Returns:
      The batch with float32 images, as `take` returns it, and the other entries.
    """
    image, index = batch["image"], batch["index"]
    if augment.pad or augment.flip:
        if view is not None:
            shift, flip = fixed(jnp.asarray(view.crops)[index])
        else:
            shift, flip = _random(key, len(index), augment)
        image = augmented(jnp, image, shift, flip, augment)
    found = {**batch, "image": standardized(jnp, image, standardize)}
    if view is not None:
        found["view"] = jnp.full(index.shape, view.number, jnp.int32)
    return found


def fixed(crops: Any) -> tuple[Any, Any]:
    """The shift and the flip of each example, from the crops of its view."""
    return crops[:, :2].astype(np.int32), crops[:, 2] == 1


def _random(
    key: PRNGKeyArray | None, n: int, augment: Augment
) -> tuple[Int32[Array, "n 2"], Bool[Array, " n"]]:
    """A random shift and flip for each of n examples."""
    if key is None:
        do = "Pass key=, a new one at every step."
        raise Refusal(message("take", f"a key for {augment}", "None", do))
    shift_key, flip_key = jax.random.split(key)
    end = 2 * augment.pad + 1
    shift = jax.random.randint(shift_key, (n, 2), 0, end, jnp.int32)
    return shift, jax.random.bernoulli(flip_key, 0.5, (n,))


def augmented(xp: Any, image: Any, shift: Any, flip: Any, augment: Augment) -> Any:
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
    """Positions that a shifted crop reads along one axis; outside they are padding."""
    if augment.pad >= length:  # a crop could show nothing of the image
        wanted = f"a pad below the image's {length} pixels"
        raise Refusal(message("take", wanted, str(augment.pad), "Lower it."))
    index = shift[:, None] + xp.arange(length, dtype=xp.int32) - augment.pad
    if augment.reflect:  # -1 reads 1, and length reads length - 2
        index = length - 1 - xp.abs(length - 1 - xp.abs(index))
    return index


def evaluation_batches(
    source: Placed | Source, batch_size: int, standardize: Standardize
) -> Iterator[dict[str, Array | np.ndarray]]:
    """Every example once, in order, in batches of one shape.

    Args:
      source: a split on the device, on the host or on disk.
      batch_size: may be larger than the split.
      standardize: the statistics of the training split.

    Yields:
      Batches as `take` returns them, with "where" (bool [batch]). The last batch is
      filled with repeats of the last example, where "where" is False.
    """
    if batch_size < 1 or not source.n:
        wanted = "a batch size above 0 and a split with examples"
        got = f"{batch_size} and {source.n}"
        raise Refusal(message("evaluation_batches", wanted, got))
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
