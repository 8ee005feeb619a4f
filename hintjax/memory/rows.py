"""A memory bank and its rows, which may be split over the devices of a mesh."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, ScalarLike

from hintjax.sharding import automatic, batch_axes, over_batch, shares

HIGHEST = jax.lax.Precision.HIGHEST
PIECES = 4  # a device scores its anchors in pieces, one by one, to save memory


class MemoryBank(NamedTuple):
    """One embedding of norm 1 per training example and network.

    Attributes:
        student: the student's embeddings.
        teacher: the teacher's embeddings.
        student_constant: log Z of the student's anchors; -inf until it is set.
        teacher_constant: log Z of the teacher's anchors; -inf until it is set.
    """

    student: Float[Array, "size features"]
    teacher: Float[Array, "size features"]
    student_constant: Float[Array, ""]
    teacher_constant: Float[Array, ""]


class Mail:
    """Examples and the devices that hold their rows, inside a `shard_map`.

    Every device has the same room for letters to each other device: a few more than the
    average number. Letters without room are sent in the next round, so nothing is lost
    however the rows are spread; in a shuffled batch almost no letter has to wait.
    """

    def __init__(self, index: Array, chosen: Array, size: int, mesh: Mesh) -> None:
        n = shares(mesh)
        self.axes = batch_axes(mesh)
        mean = index.shape[0] / n
        self.room = min(index.shape[0], math.ceil(mean + 4 * mean**0.5 + 4))
        self.box = n * self.room
        self.home = index // size
        self.chosen = chosen & (self.home >= 0) & (self.home < n)
        same = self.chosen & (self.home[:, None] == self.home[None, :])
        self.turn = jnp.sum(jnp.tril(same, -1), 1)
        longest = jnp.max(jnp.where(self.chosen, self.turn + 1, 0))
        self.needed = -(-jax.lax.pmax(longest, self.axes) // self.room)

    def rounds(self, deliver: Callable[..., Any], carried: PyTree) -> PyTree:
        """Runs the rounds that are needed, the same number on all devices."""
        return jax.lax.fori_loop(0, self.needed, deliver, carried)

    def sent(self, turn: ScalarLike, values: Array, empty: int) -> Array:
        """The values that all devices sent to this one: (devices x room, ...)."""
        shape = self.box, *values.shape[1:]
        place, _ = self._place(turn)
        box = jnp.full(shape, empty, values.dtype).at[place].set(values, mode="drop")
        return self.exchanged(box)

    def exchanged(self, box: Array) -> Array:
        """Sends each device its part of the box, and returns the parts received."""
        return jax.lax.all_to_all(box, self.axes, 0, 0, tiled=True)

    def answered(self, turn: ScalarLike, box: Array, before: Array) -> Array:
        """The answers to the examples of this turn; the others keep `before`."""
        place, now = self._place(turn)
        answers = self.exchanged(box)[jnp.minimum(place, self.box - 1)]
        return jnp.where(now[:, None], answers, before)

    def _place(self, turn: ScalarLike) -> tuple[Array, Array]:
        """Each example's place in the box, and whether it is sent in this turn."""
        slot = self.turn - turn * self.room
        now = self.chosen & (slot >= 0) & (slot < self.room)
        return jnp.where(now, self.home * self.room + slot, self.box), now


def split_rows(bank: MemoryBank, mesh: Mesh) -> MemoryBank:
    """The `PartitionSpec` of each part of a bank whose rows are split over a mesh."""
    rows, whole = over_batch(mesh).spec, PartitionSpec()
    return bank._replace(
        student=rows, teacher=rows, student_constant=whole, teacher_constant=whole
    )


def batch_rows(
    bank: MemoryBank, index: Int[Array, " batch"], *, mesh: Mesh | None = None
) -> tuple[Float[Array, "batch features"], Float[Array, "batch features"]]:
    """The two rows of each example of a batch: the student's and the teacher's.

    Args:
        bank: the bank.
        index: the positions of the batch's examples in the training set.
        mesh: the mesh over which the bank's rows are split; each device sends the rows
            that it holds.

    Returns:
        The student's rows and the teacher's, split like the batch.
    """
    if mesh is None:
        return bank.student[index], bank.teacher[index]
    split = over_batch(mesh).spec

    @partial(
        jax.shard_map,
        mesh=automatic(mesh),
        in_specs=(split,) * 3,
        out_specs=(split,) * 2,
    )
    def local(student, teacher, index):
        mail = Mail(index, jnp.ones(index.shape, bool), student.shape[0], mesh)

        def fetch(turn, found):
            asked, _ = own_rows(mail.sent(turn, index, 0), student, mesh)
            return tuple(
                mail.answered(turn, rows[asked], before)
                for rows, before in zip((student, teacher), found, strict=True)
            )

        nothing = jnp.zeros((index.shape[0], student.shape[1]), student.dtype)
        nothing = jax.lax.pcast(nothing, batch_axes(mesh), to="varying")
        return mail.rounds(fetch, (nothing, nothing))

    return local(bank.student, bank.teacher, index)


def shared_rows(
    bank: MemoryBank, index: Int[Array, " k"], *, mesh: Mesh | None = None
) -> tuple[Float[Array, "k features"], Float[Array, "k features"]]:
    """The two rows of each of some examples, the same on all devices.

    Args:
        bank: the bank.
        index: positions in the training set.
        mesh: the mesh over which the bank's rows are split; each device adds the rows
            that it holds.

    Returns:
        The student's rows and the teacher's.
    """
    if mesh is None:
        return bank.student[index], bank.teacher[index]
    split, whole = over_batch(mesh).spec, PartitionSpec()

    @partial(
        jax.shard_map,
        mesh=automatic(mesh),
        in_specs=(split, split, whole),
        out_specs=(whole, whole),
    )
    def local(student, teacher, index):
        row, here = own_rows(index, student, mesh)
        found = tuple(jnp.where(here[:, None], v[row], 0) for v in (student, teacher))
        return jax.lax.psum(found, batch_axes(mesh))

    return local(bank.student, bank.teacher, index)


def scores_by_rows(
    anchors: Float[Array, "batch features"],
    vectors: Float[Array, "rows features"],
    index: Int[Array, "batch k"],
    *,
    mesh: Mesh,
) -> Float[Array, "batch k"]:
    """Inner products of anchors with their own candidates, rows split over a mesh.

    Every device scores the anchors of all devices with its own rows, in a matrix
    product, and sends each device the scores of its anchors. Each anchor then has
    scores with the whole bank, and keeps the scores of its candidates. No row leaves
    its device. A device sends the same number of scores on any number of devices, and
    holds the scores of a quarter of its anchors at a time. Gradients go the same ways
    back to the anchors; the rows are stored state and get no gradient.

    Args:
        anchors: embeddings, split like the batch.
        vectors: one of the bank's two arrays.
        index: candidates of each anchor.
        mesh: the mesh.

    Returns:
        One score per anchor and candidate; 0 for a candidate outside the bank.
    """
    split, axes = over_batch(mesh).spec, batch_axes(mesh)

    @partial(
        jax.shard_map, mesh=automatic(mesh), in_specs=(split,) * 3, out_specs=split
    )
    def local(anchors, vectors, index):
        pieces = math.gcd(anchors.shape[0], PIECES)
        some = (pieces, anchors.shape[0] // pieces)
        size = vectors.shape[0]

        def of_some(anchors, index):
            batch = anchors.shape[0]
            anchors = jax.lax.all_gather(anchors, axes, tiled=True)
            # Not with vectors.T: the gradient would keep a copy of it.
            scores = jnp.einsum("bd,rd->br", anchors, vectors, precision=HIGHEST)
            # One block of these anchors from each device, in the order received.
            scores = jax.lax.all_to_all(scores, axes, 0, 0, tiled=True)
            home, row = index // size, index % size
            block = jnp.where(home < 0, shares(mesh), home) * batch
            place = block + jnp.arange(batch)[:, None]
            return scores.at[place, row].get(mode="fill", fill_value=0)

        pair = (x.reshape(*some, x.shape[1]) for x in (anchors, index))
        return jax.lax.map(lambda pair: of_some(*pair), tuple(pair)).reshape(
            index.shape
        )

    return local(anchors, jax.lax.stop_gradient(vectors), index)


def own_rows(index: Array, vectors: Array, mesh: Mesh) -> tuple[Array, Array]:
    """The bank's rows as row numbers of this device, and whether it holds them."""
    size = vectors.shape[0]
    index = index - jax.lax.axis_index(batch_axes(mesh)) * size
    return jnp.clip(index, 0, size - 1), (index >= 0) & (index < size)
