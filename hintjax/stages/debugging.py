"""Debug mode: a step that says which value is wrong, where, and in which example.

The checks are made inside the compiled step by `jax.experimental.checkify`, under
gradients, scans and meshes too. (`chex.chexify` is made of it, but what its sentences
say is fixed while the step is traced.) They are not in the program of a stage that is
not `checked`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int, PyTree

from hintjax._checks import Refusal, message
from hintjax.method import Method
from hintjax.stages.report import by_layer

AnyStage = TypeVar("AnyStage")
_watching = contextvars.ContextVar("watching", default=False)


def checked(stage: AnyStage) -> AnyStage:
    """The same stage, whose `update` and `evaluate` raise at a value that is wrong.

    Checked are: labels, which have to be among the classes of the outputs; what a batch
    holds, parameters, features and outputs of both networks, outputs of regressors, the
    losses of all terms and the gradient, which have to be finite; and features, of which
    no example may have only zeros: methods that normalise find no direction there.
    Examples that "where" leaves out may be anything.

    Every step waits for its checks. The state is not donated, so that the one before
    the error is still there. What is right comes to the same bits, as far as the
    compiler computes the same either way.

    A memory that is split over a mesh, as CRD's with `mesh`, cannot be checked: checkify
    does not pass through `shard_map`.

    Args:
        stage: any stage, on one device or on a mesh.

    Returns:
        The stage. Its functions raise ValueError, for instance "step 12: expected
        labels in 0..9, got 10 at example 3."; as do other functions of `stage.teach`
        and `stage.step` that are made by `raising`.
    """
    return stage._replace(
        update=raising(stage.update.__wrapped__),
        evaluate=raising(stage.evaluate.__wrapped__),
    )


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    """The jit of a function of a stage's `teach` and `step`, with its checks.

    Args:
        function: of arrays; not jitted, since its trace has to be a new one.

    Returns:
        The function, which raises ValueError after a step with a wrong value.
    """

    def with_checks(*arguments):
        before = _watching.set(True)
        try:
            return function(*arguments)
        finally:
            _watching.reset(before)

    compiled = jax.jit(checkify.checkify(with_checks))

    @functools.wraps(function)
    def call(*arguments):
        error, result = compiled(*arguments)
        if sentence := error.get():
            raise ValueError(sentence.removesuffix(" (`check` failed)"))
        return result

    return call


def watching() -> bool:
    """Whether what is traced now is to have checks."""
    return _watching.get()


def watched(
    method: Method, number: Callable[[Int[Array, ""]], Int[Array, ""]]
) -> Callable[..., Any]:
    """`Method.apply` with checks of what it is given and what it gives.

    Args:
        method: the method.
        number: of an example in its batch, from its place in what the method sees.

    Raises:
        ValueError: if the method splits its memory over a mesh.
    """
    if method.split is not None:
        wanted = "a method whose memory every device has"
        do = "Check it on one device, or without the method's mesh=."
        raise Refusal(message("checked", wanted, "one that splits it", do))

    def checking(params, memory, student, teacher, batch, context):
        n = jax.tree.leaves(batch)[0].shape[0]
        where = batch.get("where", jnp.ones(n, bool))
        check = _Check(context.step, where, number)
        for name, leaf in _named(batch):
            check.finite(f"{name!r} in the batch", leaf)
        check.labels(batch.get("label"), student.output, teacher.output)
        for whose, shown in (("teacher", teacher), ("student", student)):
            for path, hint in shown.hints.items():
                check.finite(f"features of the {whose} at {path!r}", hint)
                check.directed(f"features of the {whose} at {path!r}", hint)
            check.finite(f"outputs of the {whose}", shown.output)
        with check.outputs_of_modules():
            values, memory, metrics = method.apply(
                params, memory, student, teacher, batch, context
            )
        for name in metrics:
            if f"{name}/weighted" in metrics:
                check.finite(f"losses of the term {name!r}", metrics[name])
        check.finite("losses", values)
        return values, memory, metrics

    return checking


def look(name: str, params: dict[str, PyTree], step: Array) -> None:
    """Checks that arrays are finite, layer by layer, if what is traced has checks.

    Args:
        name: of the arrays, such as "gradients".
        params: `{"student": ..., "regressors": ...}`.
        step: the number of the step, for the message.
    """
    if watching():
        check = _Check(step, None, None)
        for layer, leaves in by_layer(params, False).items():
            check.finite(f"{name} in {layer}", leaves)


class _Check:
    """Checks of one step."""

    def __init__(self, step, where, number):
        self._step, self._where, self._number = step, where, number

    def finite(self, what, tree):
        """All floats of a tree; it tells the example if the first axis is the batch."""
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                self._all(jnp.isfinite(leaf), f"finite {what}", leaf)

    def directed(self, what, leaf):
        """Features of every example, which have a norm > 0."""
        if jnp.issubdtype(leaf.dtype, jnp.floating) and self._is_batch(leaf):
            largest = jnp.max(jnp.abs(leaf), tuple(range(1, leaf.ndim)))
            # What is not finite was another check's.
            self._all(~(largest == 0), f"{what} to have a norm > 0", largest)

    def labels(self, label, *outputs):
        """Integers that are classes; one output is of two classes."""
        if label is None or not jnp.issubdtype(label.dtype, jnp.integer):
            return
        classes = [x.shape[-1] for x in outputs if getattr(x, "ndim", 0) > 1]
        if not classes:
            self._all(label >= 0, "labels >= 0", label)
            return
        count = max(classes[0], 2)
        good = (label >= 0) & (label < count)
        self._all(good, f"labels in 0..{count - 1}", label)

    @contextlib.contextmanager
    def outputs_of_modules(self) -> Iterator[None]:
        """While it is open: whatever Flax modules give, which are the regressors."""

        def look(call, arguments, keywords, context):
            result = call(*arguments, **keywords)
            name = "/".join((type(context.module).__name__, *context.module.path))
            self.finite(f"outputs of the regressor {name}", result)
            return result

        with nn.intercept_methods(look):
            yield

    def _is_batch(self, leaf):
        return self._where is not None and leaf.shape[:1] == self._where.shape

    def _all(self, good: Bool[Array, "..."], wanted: str, leaf: Array) -> None:
        got, told = "{value}", {"step": self._step}
        if self._is_batch(leaf):
            good = good | jnp.expand_dims(~self._where, tuple(range(1, good.ndim)))
        place = jnp.unravel_index(jnp.argmin(good), good.shape)
        if self._is_batch(leaf):
            got = "{value} at example {number}"
            told["number"] = self._number(place[0])
        # Braces of a name are not those of the sentence.
        wanted = wanted.replace("{", "{{").replace("}", "}}")
        sentence = message("step {step}", wanted, got)
        checkify.check(jnp.all(good), sentence, value=leaf[place], **told)


def _named(batch):
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
