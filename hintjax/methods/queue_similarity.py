"""Similarity to a queue of the teacher's embeddings (SEED; lightly's first version)."""

import jax.numpy as jnp
from jaxtyping import Array

from hintjax import regressors
from hintjax._checks import Refusal, message, positive, positive_int
from hintjax._numerics import as_float, unit
from hintjax.losses import queue_similarity_loss
from hintjax.memory import enqueue
from hintjax.method import Applied, Batch, Context, Data, Method, hints_of
from hintjax.methods._shapes import checked
from hintjax.networks import Features

# lightly's size of the queue for fewer training examples than the first number.
_SIZES = (
    *((50, 16), (100, 32), (250, 64), (500, 128), (1000, 256), (2000, 512)),
    *((4000, 1024), (10000, 2048), (20000, 4096)),
)
_LARGEST = 8192


def queue_similarity(
    pair: tuple[str, str], *, size: int | None = None, temperature: float = 0.07
) -> Method:
    """The student's embedding is as near to earlier embeddings as the teacher's.

    A linear map of the student's pooled features gives an embedding of the teacher's
    width. A queue has the teacher's embeddings of the examples seen last. The softmax
    over the similarities to the queue is matched (`queue_similarity_loss`). Embeddings
    of a training batch enter the queue before the loss. No labels are needed.

    It is the first version of lightly-train's distillation, at weight 1. The third
    version adds the similarity between positions::

        objective(
            whole=weighted(queue_similarity(("pool", "class_token")), 1.0),
            parts=weighted(
                dense_matching([("map", "map")], loss=position_similarity_loss), 1.0
            ),
        )

    Args:
        pair: (guided layer, hint layer), as paths: embeddings (batch, c). Maps and
            tokens are averaged over positions; for a class token use `hintjax.viewed`
            with `teacher=lambda x: x[:, 0]`.
        size: number of rows of the queue; less than the number of training examples. By
            default lightly's: from 16 (fewer than 50 examples) to 8192 (20,000 or
            more); a stage is then initialized with `data=hintjax.Data(labels)`.
        temperature: the temperature T of the similarities, > 0.

    Returns:
        The method. It trains `regressor`; remembers `queue`, (size, channels of the
        hint layer), whose empty rows are 0. Steps that are skipped do not change it. In
        evaluation the batch is in front of the queue for the loss alone.

    Raises:
        ValueError: if the temperature or the size is out of range; when a stage is
            initialized, if there is neither a size nor data, or if the queue has
            as many rows as there are training examples.

    Convention:
        On a mesh the queue holds the embeddings of all devices, so the result does not
        depend on their number. In lightly-train each device has its own queue.

    References:
        Fang et al. 2021, SEED: Self-supervised Distillation for Visual Representation;
        lightly-train, code (distillation.py, distillationv3.py).
    """
    caller = "queue_similarity"
    positive(caller, temperature=temperature)
    if size is not None:
        positive_int(caller, size=size)
    student_wants, teacher_wants = hints_of(caller, [pair])
    guided, hint = pair

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        head = regressors.Embedding(teacher.hints[hint].shape[-1])
        params, _ = regressors.init(head, key, student.hints[guided].shape)
        rows = _rows(caller, size, data)
        queue = jnp.zeros((rows, head.features), jnp.float32)
        return {"regressor": params}, {"queue": queue}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        t = as_float(caller, teacher.hints[hint])
        t = unit(jnp.mean(t, tuple(range(1, t.ndim - 1))))
        head = regressors.Embedding(t.shape[-1])
        ours = student.hints[guided]
        s, _ = regressors.apply(head, params["regressor"], {}, ours, context.train)
        where = batch.get("where")
        queue = enqueue(memory["queue"], t, where=where)
        values = queue_similarity_loss(
            s, t, queue, temperature=temperature, where=where
        )
        return values, {"queue": queue} if context.train else memory, {}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked(caller, [pair], method)


def _rows(caller: str, size: int | None, data: Data | None) -> int:
    """Returns the size of the queue, by default of the size of the training set."""
    if data is None:
        if size is not None:
            return size
        wanted = "the size of the queue, or the training set"
        do = "Give size=, or pass data=hintjax.Data(labels) to the stage's init."
        raise Refusal(message(caller, wanted, "neither", do))
    if size is None:
        return next((rows for least, rows in _SIZES if data.size < least), _LARGEST)
    if size >= data.size:
        wanted = f"size less than the {data.size} training examples"
        do = "A smaller queue has each example at most once."
        raise Refusal(message(caller, wanted, f"{size}", do))
    return size
