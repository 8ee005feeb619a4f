"""MiniLM and MiniLMv2: relations between tokens (Wang et al. 2020, 2021)."""

from collections.abc import Sequence

from jaxtyping import Array

from hintjax._checks import instance, positive_int, rank
from hintjax._numerics import masked_mean
from hintjax.losses import attention_distribution_loss, relation_loss
from hintjax.method import (
    Applied,
    Batch,
    Context,
    Method,
    Pairs,
    hints_of,
    nothing,
    total,
)
from hintjax.methods._shapes import alike, checked
from hintjax.methods._tokens import counted
from hintjax.networks import Features


def minilm(
    relations: Pairs,
    attention: Pairs = (),
    *,
    heads: int,
    padding: str | None = None,
) -> Method:
    """MiniLM: the tokens attend to each other as the teacher's do.

    It trains nothing beside the student, which may have any width. MiniLMv2 compares
    the queries, the keys and the values of the student's last layer with those of one
    layer of the teacher, in 48 relation heads (64 for large teachers). This is the last
    layer of a teacher of base size, or a layer above the middle of a larger teacher::

        minilm([("last/query", "hint/query"), ("last/key", "hint/key"),
                ("last/value", "hint/value")], heads=48, padding="mask")

    MiniLM compares the values of the last layers, in the networks' own heads, and the
    attention distributions of these layers, so both networks need the same number of
    heads::

        minilm([("last/value", "hint/value")], [("last/scores", "hint/scores")],
               heads=12, padding="mask")

    All pairs have weight 1. The published pretraining of a student has no other loss.

    Args:
        relations: (guided layer, hint layer) for `relation_loss`, as paths: queries,
            keys or values, (batch, n, c) or (batch, n, heads, d). Heads are
            concatenated. The losses of the pairs are summed.
        attention: the same for attention scores (batch, heads, n, n), before the
            softmax, for `attention_distribution_loss`.
        heads: the number of relation heads; it divides both widths.
        padding: the name of the token mask in the batch: bool (batch, n), True for a
            valid token. By default all tokens are valid.

    Returns:
        The method. It reports `relation` and `attention`, the sums over pairs.

    Raises:
        ValueError: if there are no pairs, if `heads` is not a positive integer, or if
            the batch has no such mask.

    References:
        Wang et al. 2020, MiniLM: Deep Self-Attention Distillation for Task-Agnostic
        Compression of Pre-Trained Transformers.
        Wang et al. 2021, MiniLMv2: Multi-Head Self-Attention Relation Distillation for
        Compressing Pretrained Transformers.
    """
    positive_int("minilm", heads=heads)
    instance("minilm", Sequence, relations=relations, attention=attention)
    wants = hints_of("minilm", [*relations, *attention])

    def relation(student: Array, teacher: Array, where: Array | None) -> Array:
        rank("minilm", 3, "batch n *width", student=student, teacher=teacher)
        student, teacher = (x.reshape(*x.shape[:2], -1) for x in (student, teacher))
        return relation_loss(student, teacher, heads=heads, where=where)

    terms = {
        "relation": (relation, relations),
        "attention": (attention_distribution_loss, attention),
    }

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        where = counted("minilm", batch, padding)
        parts = {
            name: total(
                loss(student.hints[guided], teacher.hints[hint], where=where)
                for guided, hint in pairs
            )
            for name, (loss, pairs) in terms.items()
            if pairs
        }
        metrics = {
            name: masked_mean(values, batch.get("where"))
            for name, values in parts.items()
        }
        return total(parts.values()), memory, metrics

    method = checked("minilm", relations, Method(*wants, nothing, apply))
    return checked("minilm", attention, method, alike)
