"""CC: correlation congruence (Peng et al. 2019)."""

import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from hintjax import regressors
from hintjax._checks import positive_int
from hintjax.losses import correlation_loss
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of, total
from hintjax.methods._shapes import checked, examples
from hintjax.networks import Features


def correlation_congruence(pairs: Pairs, *, feature_dim: int = 128) -> Method:
    """CC, the benchmark's form: embeddings agree along the batch (`correlation_loss`).

    A linear map embeds each layer of a pair, all its features at once. Both heads are
    trained, the teacher's head too. The loss depends on the order of the examples in
    the batch, so batches must be shuffled. The usual setting pairs the pooled features
    (the input of the classifier) at weight 0.02.

    Args:
        pairs: (guided layer, hint layer) for each pair, as paths. The losses of the
            pairs are summed.
        feature_dim: size of the embeddings.

    Returns:
        The method. It trains two heads per pair, `student` and `teacher`, under
        `guided->hint`.

    Raises:
        ValueError: if there are no pairs, or if the size is not an integer >= 1.

    References:
        Peng et al. 2019, Correlation Congruence for Knowledge Distillation;
        Tian et al. 2020, CRD, code (CC.py, LinearEmbed).
    """
    positive_int("correlation_congruence", feature_dim=feature_dim)
    student_wants, teacher_wants = hints_of("correlation_congruence", pairs)

    def sides(
        student: Features, teacher: Features
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for guided, hint in pairs:
            layers = {"student": student.hints[guided], "teacher": teacher.hints[hint]}
            yield f"{guided}->{hint}", layers

    def head(layer: Any) -> tuple[nn.Module, tuple[int, int]]:
        size = math.prod(layer.shape[1:])
        return regressors.linear((size,), (feature_dim,)), (layer.shape[0], size)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        params = {}
        for number, (name, layers) in enumerate(sides(student, teacher)):
            one = jax.random.fold_in(key, number)
            keys = zip(jax.random.split(one), layers.items(), strict=True)
            params[name] = {}
            for one, (side, layer) in keys:
                module, shape = head(layer)
                params[name][side], _ = regressors.init(module, one, shape)
        return params, {}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        values = []
        for name, layers in sides(student, teacher):
            embedded = {}
            for side, layer in layers.items():
                module, shape = head(layer)
                rows = layer.reshape(shape)
                embedded[side], _ = regressors.apply(
                    module, params[name][side], {}, rows, context.train
                )
            loss = correlation_loss(**embedded, where=batch.get("where"))
            values.append(loss)
        return total(values), memory, {}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked("correlation_congruence", pairs, method, first=examples(2))
