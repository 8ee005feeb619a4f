"""CAT-KD: class attention transfer (Guo et al. 2023)."""

from jaxtyping import Array

from hintjax._checks import Refusal, message, positive_int
from hintjax.losses import class_activation_map, class_attention_loss
from hintjax.method import Applied, Batch, Context, Data, Method, hints_of
from hintjax.methods._shapes import checked
from hintjax.methods._shapes import maps as with_positions
from hintjax.networks import Features, Wants


def class_attention(
    pair: tuple[str, str],
    classifiers: tuple[str, str] | None = ("classifier", "classifier"),
    *,
    size: int = 2,
) -> Method:
    """CAT-KD: the student sees evidence for each class where the teacher sees it.

    A class activation map is the classifier applied to each position of the network's
    last map. It is averaged to `size` x `size`, and scaled to a unit vector for each
    class. The published weight is 400, beside the task at weight 1.

    Args:
        pair: (last map of the student, last map of the teacher), as paths: the maps
            that are averaged over positions and then classified.
        classifiers: paths of the two classifiers, dense layers or 1x1 convolutions, in
            the same order. None if the pair already consists of class activation maps,
            as in networks that classify before they average (the authors' networks).
        size: height and width of the maps that are compared.

    Returns:
        The method. It trains nothing beside the student. The student's classifier
        receives a gradient through its class activation map too.

    Raises:
        ValueError: if the size is not an integer >= 1, or (when a stage is initialized)
            if a classifier has no kernel, or if the numbers of classes differ.

    References:
        Guo et al. 2023, Class Attention Transfer Based Knowledge Distillation.
    """
    positive_int("class_attention", size=size)
    hints_of("class_attention", [pair])
    if classifiers is not None:
        hints_of("class_attention", [classifiers])
    paths = (None, None) if classifiers is None else classifiers
    student_wants, teacher_wants = (
        Wants(hints=(hint,), params=(path,) if path else ())
        for hint, path in zip(pair, paths, strict=True)
    )

    def maps(features: Features, hint: str, path: str | None) -> Array:
        x = features.hints[hint]
        if path is None:
            return x
        kernel = features.params[path]["kernel"]
        return class_activation_map(x, kernel.reshape(kernel.shape[-2:]))

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        classes = []
        for features, hint, path in zip((student, teacher), pair, paths, strict=True):
            if path is not None and "kernel" not in features.params[path]:
                wanted = f"{path!r} to be a classifier with a kernel"
                got = f"{list(features.params[path])}"
                raise Refusal(message("class_attention", wanted, got))
            last = (
                features.hints[hint]
                if path is None
                else features.params[path]["kernel"]
            )
            classes.append(last.shape[-1])
        if classes[0] != classes[1]:
            wanted = "student and teacher to have the same number of classes"
            got = f"{classes[0]} and {classes[1]}"
            raise Refusal(message("class_attention", wanted, got))
        return {}, {}

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        ours, theirs = (
            maps(*each) for each in zip((student, teacher), pair, paths, strict=True)
        )
        return class_attention_loss(ours, theirs, size=size), memory, {}

    method = Method(student_wants, teacher_wants, init, apply)
    return checked("class_attention", [pair], method, with_positions)
