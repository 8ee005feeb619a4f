"""The contents of a cache: the features of the teacher that one row holds.

A row belongs to one view of one example: row `view * examples + index`. It holds the
teacher's output and hints that the methods of a run read, reduced where a method allows
it, and stored in a coding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PyTree

from hintjax._checks import Refusal, instance, message, positive_int
from hintjax._numerics import masked_mean
from hintjax.cache.coding import CODINGS, Coding
from hintjax.method import Applied, Context, Method, Reduced, reduced, union
from hintjax.networks import Features, Network, Variables, Wants
from hintjax.networks.capture import features_of
from hintjax.stages import image

ROWS = "taught"  # the entry of a batch that holds rows of a cache
Batch = Mapping[str, PyTree]


class Place(NamedTuple):
    """The rows of a batch: their numbers, and their arrays if the batch brings them.

    Attributes:
        index: the position of each example in the training split. Rows on the device
            are read without a check: an index beyond the split reads another row. The
            metric "cache/outside" counts such examples, and `hintjax.checked` refuses
            them.
        view: the number of the view of each example.
        rows: the arrays of the rows, or None if the teacher's variables hold all rows.
    """

    index: Int32[Array, " batch"]
    view: Int32[Array, " batch"]
    rows: dict[str, Array] | None


class Contents(NamedTuple):
    """The teacher's features that a cache holds, and how they are read back.

    Attributes:
        features: `(variables, batch) -> features`: runs the teacher on a batch; its
            reduced features by name.
        encode: `features -> rows`, by name.
        decode: `rows -> features`, the inverse.
        network: a teacher that reads rows. Batches without "view" (such as those of
            evaluation) run the live teacher.
        inputs: `teacher_inputs` of a stage with this teacher.
        reading: `(method) -> method` that reads the rows, for each of the methods. It
            adds the metric "cache/outside": the part of the examples of a batch whose
            row does not exist.
        rows: shape and dtype of each array of one row, by name.
        description: plain values that name the contents: coding, features, shapes.
    """

    features: Callable[[Variables, Batch], dict[str, Array]]
    encode: Callable[[Mapping[str, Array]], dict[str, Array]]
    decode: Callable[[Mapping[str, Array | np.ndarray]], dict[str, Array]]
    network: Network
    inputs: Callable[[Batch], Any]
    reading: Callable[[Method], Method]
    rows: dict[str, jax.ShapeDtypeStruct]
    description: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The number of bytes of one row."""
        return sum(row.size * row.dtype.itemsize for row in self.rows.values())


def contents(
    student: Network,
    teacher: Network,
    methods: Method | Sequence[Method],
    student_variables: Variables,
    teacher_variables: Variables,
    batch: Batch,
    *,
    coding: str = "float32",
    examples: int,
    views: int = 1,
    inputs: Callable[[Batch], PyTree] = image,
    teacher_inputs: Callable[[Batch], PyTree] = image,
) -> Contents:
    """Plans a cache by tracing; nothing is computed.

    Args:
        student: the student; a reduction may depend on the sizes of its layers.
        teacher: the teacher.
        methods: the methods that read the cache, or one of them.
        student_variables: the student's variables, or their shapes.
        teacher_variables: the teacher's variables, or their shapes.
        batch: one batch, or its shapes.
        coding: "float32", "bfloat16" or "int8"; see `CODINGS`.
        examples: the number of examples of the training split.
        views: the number of views of each example.
        inputs: `(batch) -> inputs` of the student.
        teacher_inputs: `(batch) -> inputs` of the teacher.

    Returns:
        The contents.

    Raises:
        ValueError: if the coding is unknown, or the methods read nothing of the
            teacher that depends on the inputs.
    """
    if coding not in CODINGS:
        raise Refusal(message("cache", f"a coding among {list(CODINGS)}", repr(coding)))
    positive_int("cache", examples=examples, views=views)
    methods = (methods,) if isinstance(methods, Method) else tuple(methods)
    instance("cache", Method, **{f"method {i}": m for i, m in enumerate(methods)})
    wants = union(*(method.teacher for method in methods))
    if not (wants.output or wants.hints):
        got = "methods that read neither its output nor its hints"
        raise Refusal(message("cache", "a method that learns from the teacher", got))
    shapes = _guided(student, methods, student_variables, inputs, batch)
    reductions = [reduced(method, shapes) for method in methods]
    live = _live(teacher, wants, methods, reductions)

    def features(variables: Variables, batch: Batch) -> dict[str, PyTree]:
        return live(*variables, teacher_inputs(batch))

    shown = jax.eval_shape(features, teacher_variables, batch)
    named = dict(_named(shown))
    encode, decode = _by_name(CODINGS[coding], named)
    rows = jax.eval_shape(encode, named)

    def read(at: Place, everything: dict[str, Array] | None) -> dict[str, PyTree]:
        """The features of a batch, from its rows."""
        found = decode(_gathered(at, everything, rows, (views, examples)))
        leaves = [found[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(shown), leaves)

    def reading(method: Method) -> Method:
        limits = {"index": examples, "view": views}
        return _counting(reduced(method, shapes).method, limits)

    one = {
        name: jax.ShapeDtypeStruct(row.shape[1:], row.dtype)
        for name, row in rows.items()
    }
    return Contents(
        features=lambda variables, batch: dict(_named(features(variables, batch))),
        encode=encode,
        decode=decode,
        network=_reader(live, read, shown["hints"]),
        inputs=lambda batch: _place(batch, teacher_inputs),
        reading=reading,
        rows=one,
        description={
            "coding": coding,
            "rows": {
                name: [str(row.dtype), list(row.shape)] for name, row in one.items()
            },
        },
    )


def _guided(
    student: Network,
    methods: Sequence[Method],
    variables: Variables,
    inputs: Callable[[Batch], PyTree],
    batch: Batch,
) -> Features:
    """The shapes of the student's features, on which a reduction may depend."""
    wants = union(*(method.student for method in methods))

    def guided(variables: Variables, batch: Batch) -> Features:
        return student.apply(*variables, inputs(batch), wants=wants, train=False)[0]

    return jax.eval_shape(guided, variables, batch)


def _live(
    teacher: Network,
    wants: Wants,
    methods: Sequence[Method],
    reductions: Sequence[Reduced],
) -> Callable[[PyTree, PyTree, PyTree], dict[str, PyTree]]:
    """`(params, state, inputs) -> features` of the live teacher, reduced."""

    def live(params: PyTree, state: PyTree, at: PyTree) -> dict[str, PyTree]:
        found, _ = teacher.apply(params, state, at, wants=wants, train=False)
        hints = {}
        for reduction, method in zip(reductions, methods, strict=True):
            hints |= reduction.reduce(_part(found, method.teacher)).hints
        return {"output": found.output if wants.output else {}, "hints": dict(hints)}

    return live


def _by_name(
    coding: Coding, features: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Callable[..., dict[str, Array]], Callable[..., dict[str, Array]]]:
    """A coding of one array as `(features -> rows, rows -> features)`, by name."""
    encode, decode = coding

    def encoded(features: Mapping[str, Array]) -> dict[str, Array]:
        return {
            f"{name}:{part}": stored
            for name, leaf in features.items()
            for part, stored in encode(leaf).items()
        }

    def decoded(rows: Mapping[str, Array | np.ndarray]) -> dict[str, Array]:
        parts: dict[str, dict[str, Array]] = {}
        for name, stored in rows.items():
            leaf, _, part = name.rpartition(":")
            parts.setdefault(leaf, {})[part] = jnp.asarray(stored)
        return {
            name: decode(stored).astype(features[name].dtype)
            for name, stored in parts.items()
        }

    return encoded, decoded


def _reader(
    live: Callable[[PyTree, PyTree, PyTree], dict[str, PyTree]],
    read: Callable[[Place, dict[str, Array] | None], dict[str, PyTree]],
    shown: Mapping[str, jax.ShapeDtypeStruct],
) -> Network:
    """The teacher that reads rows at a `Place`, and else runs live."""

    def apply(
        params: PyTree,
        state: PyTree,
        at: Any,
        *,
        wants: Wants,
        train: bool,
        key: Array | None = None,
    ) -> tuple[Features, PyTree]:
        if isinstance(at, Place):
            found = read(at, state["rows"])
        else:
            found = live(params, state["live"], at)
        hints = {name: found["hints"][name] for name in wants.hints}
        return features_of("cache", found["output"], hints, params, wants), state

    def init(key: Array, at: PyTree) -> Variables:
        raise Refusal(message("cache", "the variables of a teacher", "init"))

    def layers(
        params: PyTree, state: PyTree, at: PyTree
    ) -> dict[str, jax.ShapeDtypeStruct]:
        return dict(shown)

    return Network(init, apply, layers)


def variables_of(
    teacher: Variables, rows: Mapping[str, Array | np.ndarray] | None
) -> Variables:
    """The variables of a cached teacher.

    Args:
        teacher: the live teacher's variables.
        rows: all rows on the device, (rows, numbers) for each name; None if batches
            carry their rows.
    """
    return Variables(teacher.params, {"live": teacher.state, "rows": rows})


def flat(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as matrices (rows, numbers), as `variables_of` takes them.

    A TPU would keep feature maps with the rows innermost, and a gather would copy all
    of them at every step.
    """
    return {name: stored.reshape(stored.shape[0], -1) for name, stored in rows.items()}


def _gathered(
    at: Place,
    everything: dict[str, Array] | None,
    rows: dict[str, jax.ShapeDtypeStruct],
    count: tuple[int, int],
) -> dict[str, Array]:
    """The rows of a batch, from the batch itself or from all rows on the device."""
    found = at.rows
    if found is None:
        if everything is None:
            wanted = f"the rows on the device, or {ROWS!r} in the batch"
            do = "Pass variables_of(teacher, rows), or add read(...) to the batch."
            raise Refusal(message("cache", wanted, "neither", do))
        views, examples = count
        held = {stored.shape[0] for stored in everything.values()}
        if held != {views * examples}:
            wanted = f"rows for {views} views of {examples} examples"
            raise Refusal(message("cache", wanted, f"{sorted(held)} rows"))
        numbers = at.view * examples + at.index
        found = {name: stored[numbers] for name, stored in everything.items()}
    return {
        name: stored.reshape(-1, *rows[name].shape[1:])
        for name, stored in found.items()
    }


def _place(batch: Batch, live: Callable[[Batch], PyTree]) -> Any:
    """The inputs of a cached teacher: rows for a batch of views, else live inputs."""
    if "view" not in batch:
        return live(batch)
    return Place(batch["index"], batch["view"], batch.get(ROWS))


def _counting(method: Method, limits: Mapping[str, int]) -> Method:
    """The method, which counts the examples whose row does not exist.

    The features of these examples stay as they are: to mark them would change the
    arithmetic of the loss, and so its last bit.

    Args:
        method: a method that reads rows.
        limits: the number n by name of an entry of a batch of views, whose numbers must
            be in 0..n - 1.
    """

    def apply(
        params: dict,
        memory: dict,
        student: Features,
        teacher: Features,
        batch: Batch,
        context: Context,
    ) -> Applied:
        given = params, memory, student, teacher, batch, context
        values, memory, metrics = method.apply(*given)
        if "view" in batch:
            outside = jnp.zeros(values.shape, bool)
            for name, n in limits.items():
                outside |= (batch[name] < 0) | (batch[name] >= n)
            part = masked_mean(outside.astype(values.dtype), batch.get("where"))
            metrics = {**metrics, "cache/outside": part}
        return values, memory, metrics

    def limited(memory: dict) -> dict[str, int]:
        own = {} if method.limits is None else method.limits(memory)
        return own | {name: min(n, own.get(name, n)) for name, n in limits.items()}

    return method._replace(apply=apply, limits=limited)


def _part(features: Features, wants: Wants) -> Features:
    """The features that one method reads."""
    return Features(
        features.output if wants.output else None,
        {path: features.hints[path] for path in wants.hints},
    )


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    """Each leaf of a tree with its name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        ("/".join(str(getattr(part, "key", part)) for part in path), leaf)
        for path, leaf in leaves
    ]
