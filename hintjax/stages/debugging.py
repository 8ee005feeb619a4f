"""Debug mode: a step that says which value is wrong, where, and in which example.

`jax.experimental.checkify` makes the checks inside the compiled step, also under
gradients, scans and meshes. (`chex.chexify` is built on it, but the words of its errors
are fixed when the step is traced.) The program of a stage that is not `checked` has no
checks.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Bool, Int, PyTree

from hintjax._checks import Refusal, is_array, message
from hintjax.method import Context, Method
from hintjax.metrics import not_ignored
from hintjax.networks import Features
from hintjax.stages.compiled import Compiled
from hintjax.stages.report import by_layer
from hintjax.stages.stage import Stage

_watching = contextvars.ContextVar("watching", default=False)


def checked(stage: Stage) -> Stage:
    """Returns the same stage, whose `update` and `evaluate` raise at a wrong value.

    Labels must be among the classes of the outputs. In training, an "index" that the
    method reads must be in the training set, where its label must be that of the batch.
    Everything in a batch, parameters, features and outputs of both networks, outputs of
    regressors, the losses of all terms and the gradient must be finite. No example may
    have features that are all 0, since methods that normalize find no direction there.
    Examples that "where" leaves out are not checked.

    Every step waits for its checks. The state is not donated, so the state before the
    error still exists. A step without wrong values gives the same bits as without
    checks, as far as the compiler computes both in the same way.

    A memory that is split over a mesh (CRD's with `mesh`) cannot be checked: checkify
    does not pass through `shard_map`.

    Args:
        stage: any stage, on one device or on a mesh.

    Returns:
        The stage. Its functions raise ValueError, for example "step 12: expected labels
        in 0..9, got 10 at example 3.". So do other functions of `stage.teach` and
        `stage.step` that `raising` has made.
    """
    return stage._replace(
        update=Compiled(raising(inspect.unwrap(stage.update))),
        evaluate=Compiled(raising(inspect.unwrap(stage.evaluate))),
    )


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the jit of a function of a stage's `teach` and `step`, with checks.

    Args:
        function: of arrays; not jitted, because it must be traced anew.

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
            raise Refusal(sentence.removesuffix(" (`check` failed)"))
        return result

    return call


def watching() -> bool:
    """Whether the function that is being traced gets checks."""
    return _watching.get()


def watched(
    method: Method, number: Callable[[Int[Array, ""]], Int[Array, ""]]
) -> Callable[..., Any]:
    """Returns `Method.apply` with checks of its arguments and results.

    Args:
        method: the method.
        number: `(position in the method's batch) -> position in the whole batch`.

    Raises:
        ValueError: if the method splits its memory over a mesh.
    """
    if method.split is not None:
        wanted = "a method whose memory is whole on every device"
        do = "Check it on one device, or without the method's mesh=."
        raise Refusal(
            message("checked", wanted, "a memory that is split over a mesh", do)
        )

    def checking(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Mapping[str, Array],
        context: Context,
    ) -> tuple[Array, dict, dict]:
        n = jax.tree.leaves(batch)[0].shape[0]
        where = batch.get("where", jnp.ones(n, bool))
        check = _Check(context.step, _Examples(where, number))
        for name, leaf in _named(batch):
            check.finite(f"{name!r} in the batch", leaf)
        outputs = (student.output, teacher.output)
        check.labels(batch.get("label"), *outputs, ignored=method.ignored)
        limits = {}
        if context.train and method.limits is not None:
            limits = method.limits(memory)
        for name, n in limits.items():
            if name in batch:
                check.limited(f"{name!r} in 0..{n - 1}", batch[name], n)
        if context.train and method.mislabeled is not None:
            check.labeled(method.mislabeled(memory, batch), batch["label"])
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
        check = _Check(step, None)
        for layer, leaves in by_layer(params, False).items():
            check.finite(f"{name} in {layer}", leaves)


class _Examples(NamedTuple):
    """The examples of a batch: which count, and their positions in the whole batch."""

    where: Bool[Array, " batch"]
    number: Callable[[Array], Array]


class _Check:
    """The checks of one step.

    Args:
        step: the number of the step, for messages.
        examples: of the batch; None if the arrays have no examples.
    """

    def __init__(self, step: Int[Array, ""], examples: "_Examples | None"):
        self._step, self._examples = step, examples

    def finite(self, what: str, tree: PyTree) -> None:
        """Checks all floats of a tree, and names the example if there is one."""
        for leaf in jax.tree.leaves(tree):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                self._all(jnp.isfinite(leaf), f"finite {what}", leaf)

    def directed(self, what: str, leaf: Array) -> None:
        """Checks that the features of every example have a norm > 0."""
        if jnp.issubdtype(leaf.dtype, jnp.floating) and self._is_batch(leaf):
            largest = jnp.max(jnp.abs(leaf), tuple(range(1, leaf.ndim)))
            # Numbers that are not finite belong to another check.
            self._all(~(largest == 0), f"{what} to have a norm > 0", largest)

    def labels(
        self, label: Array | None, *outputs: Any, ignored: Sequence[int] = ()
    ) -> None:
        """Checks that integer labels are classes; one logit means two classes."""
        # The method itself refuses labels that are no array.
        if label is None or not is_array(label):
            return
        if not jnp.issubdtype(label.dtype, jnp.integer):
            return
        left_out = ~not_ignored(label, ignored)
        classes = [x.shape[-1] for x in outputs if getattr(x, "ndim", 0) > 1]
        if not classes:
            self._all((label >= 0) | left_out, "labels >= 0", label)
            return
        count = max(classes[0], 2)
        good = (label >= 0) & (label < count) | left_out
        self._all(good, f"labels in 0..{count - 1}", label)

    def limited(self, wanted: str, leaf: Array, n: int) -> None:
        """Checks that integers are in 0..n - 1."""
        self._all((leaf >= 0) & (leaf < n), wanted, leaf)

    def labeled(self, wrong: Bool[Array, " batch"], label: Array) -> None:
        """Checks that no label is another one than that of the example's index."""
        wanted = "'label' to be the label of Data(labels) at 'index'"
        self._all(~wrong, wanted, label)

    @contextlib.contextmanager
    def outputs_of_modules(self) -> Iterator[None]:
        """Checks, while open, the outputs of all Flax modules: the regressors."""

        def look(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
            result = call(*arguments, **keywords)
            name = "/".join((type(context.module).__name__, *context.module.path))
            self.finite(f"outputs of the regressor {name}", result)
            return result

        with nn.intercept_methods(look):
            yield

    def _is_batch(self, leaf: Array) -> bool:
        where = None if self._examples is None else self._examples.where
        return where is not None and leaf.shape[:1] == where.shape

    def _all(self, good: Bool[Array, "..."], wanted: str, leaf: Array) -> None:
        got, told = "{value}", dict[str, Any](step=self._step)
        examples = self._examples if self._is_batch(leaf) else None
        if examples is not None:
            others = ~examples.where
            good = good | jnp.expand_dims(others, tuple(range(1, good.ndim)))
        place = jnp.unravel_index(jnp.argmin(good), good.shape)
        if examples is not None:
            got = "{value} at example {number}"
            told["number"] = examples.number(place[0])
        # checkify formats the sentence: braces in a name are escaped.
        wanted = wanted.replace("{", "{{").replace("}", "}}")
        sentence = message("step {step}", wanted, got)
        checkify.check(jnp.all(good), sentence, value=leaf[place], **told)


def _named(batch: PyTree) -> Iterator[tuple[str, Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
