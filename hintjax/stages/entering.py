"""The door of a stage: every argument is checked here, once.

The checks read types and shapes. Those of compiled functions run while the function is
traced, so they cost nothing in later calls. A form that has one meaning is accepted:
Flax variables, a dict with "params", are split. Any other form is refused in one
sentence.
"""

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hintjax._checks import (
    Refusal,
    WrongType,
    described,
    form,
    instance,
    is_array,
    key,
    mask,
    message,
)
from hintjax.method import Data
from hintjax.networks import Features, Variables
from hintjax.networks.network import read_variables
from hintjax.stages.stage import Batch, State

_ENTRIES = 'Write the batch as a dict of arrays, {"image": images, "label": labels}.'


def check_key(given: Any) -> None:
    """Raises unless it is one random key, also a raw one of `jax.random.PRNGKey`."""
    key("stage", 0, do="Pass jax.random.key(0).", key=given)


def student(given: Any) -> Variables:
    """Returns the student's variables, whose parameters can be trained.

    Args:
        given: the variables in any form that `read_variables` accepts.

    Raises:
        WrongType: if the form is another, or a parameter is not floating point.
    """
    _refuse_state("student", given)
    variables = read_variables("stage", "the student's", given)
    check_arrays("the student's", variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            wanted = "the student's parameters to be floating point"
            got = f"{jnp.result_type(leaf)} at {name!r}"
            do = "Keep arrays that are not trained in another collection, the state."
            raise WrongType(message("stage", wanted, got, do))
    return variables


def teacher(given: Any) -> Variables | None:
    """Returns the teacher's variables; None if there is no teacher.

    Args:
        given: None, or the variables in any form that `read_variables` accepts.

    Raises:
        WrongType: if the form is another.
    """
    if given is None:
        return None
    _refuse_state("teacher", given)
    return read_variables("stage", "the teacher's", given)


def check_arrays(whose: str, variables: Variables | None) -> None:
    """Raises unless all variables of a network are arrays or numbers.

    Args:
        whose: the network in the message, such as "the student's".
        variables: its variables, or None.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not (_is_entry(leaf) or isinstance(leaf, int | float)):
            name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            wanted = f"{whose} variables to be arrays"
            got = f"{form(leaf)} at {name!r}"
            do = "Pass the result of the network's init."
            raise WrongType(message("stage", wanted, got, do))


def _refuse_state(whose: str, given: Any) -> None:
    """Raises if a stage's state stands where variables belong."""
    if isinstance(given, State):
        wanted = f"the {whose}'s variables"
        do = "Pass hintjax.student_variables(state)."
        raise WrongType(message("stage", wanted, "the State of a stage", do))


def check_batch(given: Any) -> None:
    """Raises unless it is a dict of arrays with one row for each example.

    Args:
        given: the batch, of arrays or their shapes.
    """
    if not isinstance(given, Mapping):
        raise WrongType(message("batch", "a dict of arrays", form(given), _ENTRIES))
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not _is_entry(leaf):
            wanted = f"{name!r} to be an array of JAX or NumPy"
            do = "Convert it first, e.g. with numpy.asarray."
            raise WrongType(message("batch", wanted, form(leaf), do))
        if not leaf.shape:
            wanted = f"{name!r} to have one row for each example"
            do = "Make it an array with a first axis of examples."
            raise Refusal(message("batch", wanted, f"{leaf.dtype} ()", do))
        sizes[name] = leaf.shape[0]
    if not sizes:
        raise Refusal(message("batch", "entries", "a dict without arrays", _ENTRIES))
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{size} of {name!r}" for name, size in sizes.items())
        wanted = "all entries to have the same number of examples"
        raise Refusal(message("batch", wanted, got))
    if 0 in sizes.values():
        raise Refusal(message("batch", "at least one example", "0 examples"))
    mask("batch", given.get("where"), (next(iter(sizes.values())),))


def _is_entry(leaf: Any) -> bool:
    """Whether it is an array, or the shape of one, that JAX can compute with."""
    if not (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
        return False
    # NumPy's dtypes of objects, texts and dates; random keys have a dtype of JAX.
    return not (isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "OSUMm")


def check_limits(
    batch: Batch, limits: Mapping[str, int], known: Callable[[Any], bool]
) -> None:
    """Raises if a number of a batch is known, and is not in its limits.

    Args:
        batch: the batch.
        limits: the number n by name of an entry, whose numbers must be in 0..n - 1.
        known: whether the numbers of an array are read here.

    Raises:
        Refusal: if an example that counts has another number.
    """
    where = batch.get("where")
    for name, n in limits.items():
        if not known(batch.get(name)) or not (where is None or known(where)):
            continue
        numbers = np.asarray(batch[name])
        if numbers.dtype.kind not in "iu":
            continue  # the method refuses them
        if where is not None:
            mask("batch", where, numbers.shape[:1])
            numbers = numbers[np.asarray(where)]
        wrong = numbers[(numbers < 0) | (numbers >= n)]
        if wrong.size:
            wanted = f"{name!r} in 0..{n - 1}, as the method reads it"
            do = "An index is a position in the training set, whose labels Data holds."
            raise Refusal(message("batch", wanted, f"{wrong.flat[0]}", do))


def is_numpy(given: Any) -> bool:
    """Whether it is an array of NumPy: its numbers are read without a device."""
    return isinstance(given, np.ndarray)


def check_state(given: Any) -> None:
    """Raises unless it is the `State` of a stage."""
    do = "Pass the result of stage.init, or the first result of stage.update."
    instance("stage", State, do, state=given)


def check_taught(given: Any) -> None:
    """Raises unless it is the teacher's `Features`."""
    do = "Pass the result of stage.teach(state, teacher, batch)."
    instance("stage", Features, do, taught=given)


def check_data(given: Any) -> None:
    """Raises unless it is None, or `Data` with the label of each example.

    A method that needs classes (CRD) refuses other labels itself.
    """
    do = "Pass hintjax.Data(labels)."
    instance("stage", (Data, NoneType), do, data=given)
    if given is not None:
        label = given.labels
        if not is_array(label) or label.ndim == 0 or label.dtype.kind not in "biuf":
            wanted = "labels to be an array with one row per example"
            raise Refusal(message("Data", wanted, described(label), do))


def check_carry(given: Any) -> None:
    """Raises unless it is None or the `State` of an earlier stage."""
    do = "Pass the last state of the earlier stage."
    instance("stage", (State, NoneType), do, carry=given)


def selected(caller: str, select: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
    """Returns the inputs of a network, which are selected from a batch.

    Args:
        caller: "inputs" or "teacher_inputs", for messages.
        select: `(batch) -> inputs`.
        batch: the batch.

    Raises:
        Refusal: if the function reads an entry that the batch does not have, or
            returns no arrays.
    """
    try:
        inputs = select(batch)
    except KeyError as error:
        if not error.args or error.args[0] in batch:
            raise
        do = f"Add it to the batch, or select other inputs with {caller}=."
        wanted = f"{error.args[0]!r} in the batch"
        raise Refusal(message(caller, wanted, f"{sorted(batch)}", do)) from error
    first = next(iter(jax.tree.leaves(inputs)), None)
    if first is None or not is_array(first) or not first.ndim:
        wanted = "arrays with one row for each example"
        do = f"Return entries of the batch, e.g. {caller}=lambda batch: batch['x']."
        raise WrongType(message(caller, wanted, form(inputs), do))
    return inputs
