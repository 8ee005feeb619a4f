"""TinyBERT: hidden states and attention scores (Jiao et al. 2020)."""

from collections.abc import Sequence

from hintjax import regressors
from hintjax._checks import Refusal, function, instance, message
from hintjax._numerics import masked_mean
from hintjax.losses import attention_score_loss, hint_loss
from hintjax.method import Method, Pairs, hints_of
from hintjax.methods._tokens import counted


def tinybert(
    hidden_pairs: Pairs,
    attention_pairs: Pairs = (),
    *,
    regressor: regressors.Sizing = regressors.linear,
    padding: str | None = None,
) -> Method:
    """TinyBERT: hidden states through a regressor, attention scores as they are.

    The hidden states are compared by `hint_loss`, over tokens, behind one linear
    regressor that all pairs share, as in the authors' code (for one per pair take
    `fitnets`); the scores before the softmax by `attention_score_loss`, and so need as
    many heads. Every pair has weight 1.

    The paper maps layer m of the student to layer m k of the teacher, which has k times
    as many: hidden states from the embeddings (m = 0) to the last, and the scores of
    every layer. It first trains on these alone (a hint stage), then on the soft targets
    (`soft_targets` at temperature 1) in a stage of their own.

    Args:
        hidden_pairs: (guided layer, hint layer) of hidden states (batch, n, c), as paths;
            all of one width in each network. They are summed.
        attention_pairs: the same of attention scores (batch, heads, n, n).
        regressor: sizes the regressor from the shapes of a pair.
        padding: the name of the batch's mask of tokens, bool (batch, n), True where a
            token counts; without it all count.

    Returns:
        The method. It trains the regressor, named `hidden`, and reports `hidden` and
        `attention`, the sums over pairs.

    Raises:
        ValueError: without any pairs; when a stage is initialized, if the hidden states
            of a network differ in shape; if the batch lacks the mask.

    References:
        Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language Understanding.
    """
    lists = {"hidden_pairs": hidden_pairs, "attention_pairs": attention_pairs}
    instance("tinybert", Sequence, **lists)
    function("tinybert", regressor=regressor)
    wants = hints_of("tinybert", [*hidden_pairs, *attention_pairs])

    def sized(student, teacher):
        shapes = {
            (student.hints[guided].shape[1:], teacher.hints[hint].shape[1:])
            for guided, hint in hidden_pairs
        }
        if len(shapes) > 1:
            do = "Hint the others in a fitnets() of their own."
            wanted = "the hidden states of each network to have one shape"
            raise Refusal(message("tinybert", wanted, f"{sorted(shapes)}", do))
        return regressor(*shapes.pop())

    def init(key, student, teacher, data):
        if not hidden_pairs:
            return {}, {}
        shape = student.hints[hidden_pairs[0][0]].shape
        params, state = regressors.init(sized(student, teacher), key, shape)
        return {"hidden": params}, {"hidden": state}

    def apply(params, memory, student, teacher, batch, context):
        where = counted("tinybert", batch, padding)
        parts = {}
        if hidden_pairs:
            module, state = sized(student, teacher), memory["hidden"]
            parts["hidden"] = 0.0
            for guided, hint in hidden_pairs:
                predicted, state = regressors.apply(
                    module,
                    params["hidden"],
                    state,
                    student.hints[guided],
                    context.train,
                )
                values = hint_loss(predicted, teacher.hints[hint], where=where)
                parts["hidden"] = parts["hidden"] + values
            memory = {"hidden": state}
        if attention_pairs:
            parts["attention"] = sum(
                attention_score_loss(
                    student.hints[guided], teacher.hints[hint], where=where
                )
                for guided, hint in attention_pairs
            )
        metrics = {
            name: masked_mean(values, batch.get("where"))
            for name, values in parts.items()
        }
        return sum(parts.values()), memory, metrics

    return Method(*wants, init, apply)
