"""Views: a method reads hints through a function, or a layer as the output."""

from collections.abc import Callable
from types import NoneType

import jax
from jaxtyping import Array

from hintjax._checks import Refusal, function, instance, message
from hintjax.method import Applied, Batch, Context, Data, Method, Reduced, reduced
from hintjax.networks import Features, Wants

View = Callable[[Array], Array]


def viewed(
    method: Method, *, student: View | None = None, teacher: View | None = None
) -> Method:
    """The same method on hints that are passed through a function first.

    For example, the teacher is convolutional and the student is a transformer. The view
    drops the student's class token and arranges its other tokens as a map. Every method
    that compares maps can then be used::

        grid = functools.partial(regressors.to_grid, drop=1)
        viewed(fitnets([("block2", "group2")]), student=grid)

    If the teacher is the transformer, pass `teacher=grid`. For two transformers with
    patches of different sizes, pass both. `lambda x: x[:, 1:]` drops a class token that
    only the teacher has.

    Args:
        method: any method or objective. Other terms of an objective are not affected.
        student: `(batch, ...) -> (batch, ...)`, applied to every hint of the student
            that the method reads; None leaves the hints unchanged.
        teacher: the same for the teacher's hints.

    Returns:
        The method.

    >>> from functools import partial
    >>> from hintjax import regressors
    >>> from hintjax.methods import attention_transfer
    >>> from hintjax.networks import Features
    >>> grid = partial(regressors.to_grid, drop=1)
    >>> method = viewed(attention_transfer([("block2", "group2")]), student=grid)
    >>> context = Context(jax.random.key(0), jax.numpy.int32(0), train=True)
    >>> hints = {"block2": jax.numpy.ones((3, 17, 8))}
    >>> maps = {"group2": jax.numpy.ones((3, 4, 4, 32))}
    >>> values, *_ = method.apply(
    ...     {}, {}, Features(hints=hints), Features(hints=maps), {}, context
    ... )
    >>> values.shape
    (3,)
    """
    instance("viewed", Method, method=method)
    views = {"student": student, "teacher": teacher}
    function("viewed", **{n: view for n, view in views.items() if view is not None})

    def seen(features: Features, wants: Wants, view: View | None) -> Features:
        if view is None:
            return features
        hints = {path: _applied(view, features.hints[path]) for path in wants.hints}
        return features._replace(hints=hints)

    def reduction(shapes: Features) -> Reduced:
        ours = jax.eval_shape(lambda f: seen(f, method.student, student), shapes)
        found = reduced(method, ours)

        def reduce(features: Features) -> Features:
            return found.reduce(seen(features, method.teacher, teacher))

        # Reduced features have passed through the teacher's function.
        return Reduced(reduce, viewed(found.method, student=student))

    made = through(
        method,
        lambda ours, theirs: (
            seen(ours, method.student, student),
            seen(theirs, method.teacher, teacher),
        ),
        again=lambda earlier: viewed(earlier, student=student, teacher=teacher),
    )
    return made if method.reduced is None else made._replace(reduced=reduction)


def at_head(
    method: Method, *, student: str | None = None, teacher: str | None = None
) -> Method:
    """The same method with the output of a layer instead of a network's output.

    It is meant for networks with several heads. In DeiT, the class token learns from
    the labels, and the distillation token learns from the teacher::

        objective(
            task=weighted(at_head(task(cross_entropy), student="classifier"), 0.5),
            kd=weighted(at_head(kd(1.0), student="distillation_classifier"), 0.5),
        )

    Args:
        method: a method that reads the outputs, such as `task` or `kd`.
        student: the path of the layer whose output replaces the student's output;
            None keeps the student's output. For a network that returns several arrays,
            `:out[0]` or `:out[logits]` is one of them.
        teacher: the same for the teacher.

    Returns:
        The method.

    Raises:
        ValueError: if the method does not read the output of that network.

    >>> from hintjax.methods import kd
    >>> at_head(kd(), student="distillation_classifier").student
    Wants(output=False, hints=('distillation_classifier',), params=())

    References:
        Touvron et al. 2021, Training Data-Efficient Image Transformers and Distillation
        through Attention.
    """
    heads = {"student": student, "teacher": teacher}
    instance("at_head", Method, method=method)
    instance("at_head", (str, NoneType), **heads)
    for name, path in heads.items():
        if path is not None and not getattr(method, name).output:
            wanted = f"a method that reads the {name}'s output"
            do = "Pass the layer as a hint to the method itself."
            raise Refusal(message("at_head", wanted, "a method without it", do))

    def wants(of: Wants, path: str | None) -> Wants:
        if path is None:
            return of
        return Wants(False, tuple(dict.fromkeys((*of.hints, path))), of.params)

    def seen(features: Features, path: str | None) -> Features:
        if path is None:
            return features
        return features._replace(output=features.hints[path])

    made = through(
        method,
        lambda ours, theirs: (seen(ours, student), seen(theirs, teacher)),
        again=lambda earlier: earlier,
    )
    return made._replace(
        student=wants(method.student, student), teacher=wants(method.teacher, teacher)
    )


def through(
    method: Method,
    seen: Callable[[Features, Features], tuple[Features, Features]],
    again: Callable[[Method], Method],
) -> Method:
    """The method on features that are passed through a function first.

    Args:
        method: any method. The caller replaces its wants (`student` and `teacher`).
        seen: `(student, teacher) -> (student, teacher)`, on features. It must accept
            shapes too.
        again: makes the same change to `method.prepare`.

    Returns:
        The method.
    """

    def init(
        key: Array, student: Features, teacher: Features, data: Data | None
    ) -> tuple[dict, dict]:
        return method.init(key, *seen(student, teacher), data)

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        return method.apply(params, memory, *seen(student, teacher), batch, context)

    return method._replace(
        init=init,
        apply=apply,
        prepare=None if method.prepare is None else again(method.prepare),
        deploy=_shipped(method.deploy, seen),
        reduced=None,  # it reads features that have not passed through the function
    )


def _shipped(
    deploy: Callable[..., Array] | None,
    seen: Callable[[Features, Features], tuple[Features, Features]],
) -> Callable[..., Array] | None:
    """`Method.deploy` on features that are passed through a function first."""
    if deploy is None:
        return None

    def shipped(
        params: dict, memory: dict, student: Features, teacher: Features
    ) -> Array:
        return deploy(params, memory, *seen(student, teacher))

    return shipped


def _applied(
    view: View, hint: Array | jax.ShapeDtypeStruct
) -> Array | jax.ShapeDtypeStruct:
    """Applies a view to a hint, or to the shape of a hint."""
    if isinstance(hint, jax.ShapeDtypeStruct):
        return jax.eval_shape(view, hint)
    return view(hint)
