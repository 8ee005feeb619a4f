"""SimKD: the reused teacher classifier (Chen et al. 2022)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hintjax import regressors
from hintjax._checks import Refusal, function, instance, message
from hintjax._numerics import as_float, masked_mean
from hintjax.losses import hint_loss
from hintjax.method import Applied, Batch, Context, Data, Method, hints_of
from hintjax.methods import _regressed
from hintjax.methods._shapes import checked, maps
from hintjax.metrics import accuracy, class_labels, ignored, not_ignored
from hintjax.networks import Features


def simkd(
    pair: tuple[str, str],
    classifier: str = "classifier",
    *,
    ignore: int | Sequence[int] = (),
    regressor: regressors.Sizing = regressors.bottleneck,
) -> Method:
    """SimKD: a projector predicts the teacher's last map, its classifier does the rest.

    L = mean_i (projector(s)_i - t_i)^2,  prediction = classifier(mean of projector(s))

    The published setting is this method at weight 1, without the task and without KD:
    the student's own classifier is not used. If sizes differ, the larger map is first
    averaged to the smaller size. The student is deployed with the projector and the
    teacher's classifier: see `hintjax.export.deployed`. The deployed projector uses the
    running variance of its BatchNorms, which differs from torch's: see
    `hintjax.regressors.modules.batch_norm`.

    Args:
        pair: (last map of the student, last map of the teacher), before the pooling.
        classifier: path of the teacher's classifier, a dense layer.
        ignore: labels that are left out of the accuracy, such as -1 for examples
            without a label. By default all labels count.
        regressor: makes the projector; see `hintjax.regressors.bottleneck` for its
            width.

    Returns:
        The method. It trains the projector, named `guided->hint`, and remembers its
        BatchNorm statistics. It needs no labels. If the batch has class labels under
        "label", it reports the `accuracy` of projector and classifier.

    Raises:
        ValueError: if `ignore` is not an integer or several; or, when a stage is
            initialized, if the layers are not maps, or the classifier has no kernel.

    References:
        Chen et al. 2022, Knowledge Distillation with the Reused Teacher Classifier.
    """
    student_wants, teacher_wants = hints_of("simkd", [pair])
    instance("simkd", str, classifier=classifier)
    function("simkd", regressor=regressor)
    left_out = ignored("simkd", ignore)
    teacher_wants = teacher_wants._replace(params=(classifier,))

    beside = _regressed.beside([pair], regressor)

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        if "kernel" not in teacher.params[classifier]:
            wanted = f"the teacher's {classifier!r} to be a dense layer with a kernel"
            got = f"{list(teacher.params[classifier])}"
            raise Refusal(message("simkd", wanted, got))
        return beside.init(key, student, teacher, data)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        ((_, found, hint),), memory = beside.predict(
            params, memory, student, teacher, context.train
        )
        metrics = {}
        logits = reused_classifier(found, teacher.params[classifier])
        if "label" in batch and class_labels(logits, batch["label"]):
            right, where = accuracy(logits, batch["label"]), batch.get("where")
            if left_out:
                counted = not_ignored(batch["label"], left_out)
                where = counted if where is None else counted & where
            metrics["accuracy"] = masked_mean(right, where)
        return hint_loss(found, hint), memory, metrics

    def deploy(
        params: dict, memory: dict, student: Features, teacher: Features
    ) -> Array:
        ((_, found, _),), _ = beside.predict(params, memory, student, teacher, False)
        return reused_classifier(found, teacher.params[classifier])

    method = Method(
        student_wants, teacher_wants, init, apply, deploy=deploy, ignored=left_out
    )
    return checked("simkd", [pair], method, maps)


def reused_classifier(
    projected: Float[Array, "batch h w c"], classifier: PyTree
) -> Float[Array, "batch classes"]:
    """SimKD's prediction: the teacher's classifier on the averaged projected map.

    Args:
        projected: the projector's output.
        classifier: the teacher's `{"kernel": (c, classes), "bias": (classes,)}`; the
            bias may be missing.

    Returns:
        The logits.

    >>> kernel = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> reused_classifier(jnp.ones((1, 2, 2, 2)), {"kernel": kernel})
    Array([[2., 2.]], dtype=float32)
    """
    instance("reused_classifier", Mapping, classifier=classifier)
    if "kernel" not in classifier:
        got = f"{sorted(map(str, classifier))}"
        raise Refusal(message("reused_classifier", "a kernel", got))
    projected, kernel = as_float("reused_classifier", projected, classifier["kernel"])
    if projected.ndim != 4 or kernel.shape[:-1] != projected.shape[-1:]:
        wanted = "projected (batch, h, w, c) and a kernel (c, classes)"
        got = f"{projected.shape} and {kernel.shape}"
        raise Refusal(message("reused_classifier", wanted, got))
    pooled = projected.mean((1, 2))
    logits = jnp.matmul(pooled, kernel, precision=jax.lax.Precision.HIGHEST)
    if "bias" in classifier:
        logits = logits + classifier["bias"].astype(logits.dtype)[None]
    return logits
