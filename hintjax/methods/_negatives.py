"""The negatives of CRD: the kinds of candidates, and their draws for a batch."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from hintjax import memory as banks
from hintjax._checks import Refusal, described, labels, message, needed

INDEX = "It is the place of each example in the labels of hintjax.Data."


class Drawn(NamedTuple):
    """Candidates from the bank, as rows of the bank.

    Attributes:
        index: the negatives, for each anchor or shared by all anchors.
        valid: True for a negative of another class than its anchor; None if all are.
        positive: the positives, if they were given with the negatives.
    """

    index: Int[Array, "batch k"] | Int[Array, " k"]
    valid: Bool[Array, "batch k"] | None
    positive: Int[Array, " batch"] | None = None


# Dataclasses, because tuples of different kinds with equal entries are equal.
@dataclass(frozen=True)
class AnchorNegatives:
    """The paper's negatives: each anchor draws its own from the other classes.

    Attributes:
        number: K, the number of negatives per anchor.
    """

    number: int = 16384

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Draws indices (batch, K)."""
        keys = keys_of(key, index_of(batch))
        return Drawn(*banks.draw_others(classes, keys, label_of(batch), self.number))


@dataclass(frozen=True)
class SharedNegatives:
    """All anchors of a batch share one draw; an anchor's own class is left out.

    The scores are one matrix product with K embeddings; `AnchorNegatives` gathers
    batch x K embeddings. For each anchor, K (in its constant c) is the number of
    negatives that are valid for this anchor.

    Attributes:
        number: the number of negatives that are drawn.
    """

    number: int = 16384

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Draws indices (K,)."""
        return Drawn(*banks.draw_shared(classes, key, label_of(batch), self.number))


@dataclass(frozen=True)
class GivenNegatives:
    """Candidates that are given in the batch, as in the published loader.

    Attributes:
        name: the name of the candidates in the batch, int (batch, 1 + K): the
            positive, then the negatives.
    """

    name: str = "candidates"

    def draw(
        self, classes: banks.Classes, key: Key[Array, ""], batch: Mapping[str, Array]
    ) -> Drawn:
        """Returns the given indices (batch, K), and the positives."""
        do = "Name the candidates with GivenNegatives(name)."
        given = needed("crd", batch, self.name, do)
        if given.ndim != 2 or not jnp.issubdtype(given.dtype, jnp.integer):
            wanted = f"{self.name} to be integer (batch, 1 + K)"
            raise Refusal(message("crd", wanted, described(given)))
        return Drawn(given[:, 1:], None, given[:, 0])


@dataclass(frozen=True)
class BatchNegatives:
    """The negatives are the batch's own examples of other classes; there is no bank.

    Both embeddings of a pair are computed in this step, so both heads learn from each
    score.
    """


Drawing = AnchorNegatives | SharedNegatives | GivenNegatives
Negatives = AnchorNegatives | SharedNegatives | GivenNegatives | BatchNegatives
KINDS = typing.get_args(Negatives)
PAPER = AnchorNegatives()


def index_of(batch: Mapping[str, Array]) -> Int[Array, " batch"]:
    """The place of each example in the training set."""
    index = needed("crd", batch, "index", INDEX)
    labels("crd", None, index=index)
    return index


def label_of(batch: Mapping[str, Array]) -> Int[Array, " batch"]:
    """The class of each example."""
    label = needed("crd", batch, "label", "It is the class of each example.")
    labels("crd", None, label=label)
    return label


def keys_of(key: Key[Array, ""], index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """A key per example that does not depend on its place in the batch."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def outside(
    batch: Mapping[str, Array], limits: Mapping[str, int]
) -> Bool[Array, " batch"]:
    """Whether an example has a number outside of the limits."""
    found = [
        jnp.any((x < 0) | (x >= n), tuple(range(1, x.ndim)))
        for x, n in (
            (needed("crd", batch, name, INDEX), n) for name, n in limits.items()
        )
    ]
    return jnp.any(jnp.stack(found), 0)
