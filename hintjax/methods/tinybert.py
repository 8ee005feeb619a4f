"""TinyBERT: hidden states and attention scores (Jiao et al. 2020)."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array

from hintjax import regressors
from hintjax._checks import Refusal, function, instance, message
from hintjax._numerics import masked_mean
from hintjax.losses import attention_score_loss, hint_loss
from hintjax.method import Applied, Batch, Context, Data, Method, Pairs, hints_of, total
from hintjax.methods._shapes import alike, checked
from hintjax.methods._tokens import counted
from hintjax.networks import Features


def tinybert(
    hidden_pairs: Pairs,
    attention_pairs: Pairs = (),
    *,
    regressor: regressors.Sizing = regressors.linear,
    padding: str | None = None,
) -> Method:
    """TinyBERT: hidden states through a regressor, attention scores as they are.

    `hint_loss` compares the hidden states over tokens. One linear regressor precedes
    it, and all pairs share this regressor, as in the authors' code (for one regressor
    per pair use `fitnets`). `attention_score_loss` compares the attention scores before
    the softmax, so both networks need the same number of heads. Every pair has weight
    1.

    The paper pairs layer m of the student with layer m k of the teacher, which has k
    times as many layers. It pairs the hidden states from the embeddings (m = 0) to the
    last layer, and the scores of every layer. It first trains on these pairs alone (a
    hint stage), then on the soft targets (`soft_targets` at temperature 1) in a second
    stage.

    Args:
        hidden_pairs: (guided layer, hint layer) of hidden states (batch, n, c), as
            paths. All hidden states of a network have one width. The losses of the
            pairs are summed.
        attention_pairs: the same for attention scores (batch, heads, n, n).
        regressor: makes the regressor from the shapes of a pair.
        padding: the name of the token mask in the batch: bool (batch, n), True for a
            valid token. By default all tokens are valid.

    Returns:
        The method. It trains the regressor, named `hidden`, and reports `hidden` and
        `attention`, the sums over pairs.

    Raises:
        ValueError: if there are no pairs; when a stage is initialized, if the hidden
            states of a network differ in shape; if the batch has no such mask.

    References:
        Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language Understanding.
    """
    lists = {"hidden_pairs": hidden_pairs, "attention_pairs": attention_pairs}
    instance("tinybert", Sequence, **lists)
    function("tinybert", regressor=regressor)
    wants = hints_of("tinybert", [*hidden_pairs, *attention_pairs])

    def sized(student: Features, teacher: Features) -> nn.Module:
        shapes = {
            (student.hints[guided].shape[1:], teacher.hints[hint].shape[1:])
            for guided, hint in hidden_pairs
        }
        if len(shapes) > 1:
            do = "Use fitnets for the pairs of other shapes."
            wanted = "the hidden states of each network to have one shape"
            raise Refusal(message("tinybert", wanted, f"{sorted(shapes)}", do))
        return regressor(*shapes.pop())

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        if not hidden_pairs:
            return {}, {}
        shape = student.hints[hidden_pairs[0][0]].shape
        params, state = regressors.init(sized(student, teacher), key, shape)
        return {"hidden": params}, {"hidden": state}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        where = counted("tinybert", batch, padding)
        parts = {}
        if hidden_pairs:
            module, state = sized(student, teacher), memory["hidden"]
            values = []
            for guided, hint in hidden_pairs:
                predicted, state = regressors.apply(
                    module,
                    params["hidden"],
                    state,
                    student.hints[guided],
                    context.train,
                )
                loss = hint_loss(predicted, teacher.hints[hint], where=where)
                values.append(loss)
            parts["hidden"] = total(values)
            memory = {"hidden": state}
        if attention_pairs:
            parts["attention"] = total(
                attention_score_loss(
                    student.hints[guided], teacher.hints[hint], where=where
                )
                for guided, hint in attention_pairs
            )
        metrics = {
            name: masked_mean(values, batch.get("where"))
            for name, values in parts.items()
        }
        return total(parts.values()), memory, metrics

    method = checked("tinybert", hidden_pairs, Method(*wants, init, apply))
    return checked("tinybert", attention_pairs, method, alike)
