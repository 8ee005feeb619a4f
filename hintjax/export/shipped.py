"""The network that is shipped: the student alone, or a network that the method makes.

After most methods the student is shipped alone (`student_variables`). After SimKD it
is shipped with the projector and the teacher's classifier: a method defines this by its
`deploy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax._checks import WrongType, message
from hintjax.method import Method, union
from hintjax.networks import Features, Network, Variables, Wants
from hintjax.networks.paths import OUTPUT, outermost
from hintjax.stages import State, student_variables


def deployed(student: Network, teacher: Network | None, method: Method) -> Network:
    """The network that is shipped after training with a method.

    The method's `deploy` computes its output; its layers are the student's. The teacher
    is not run: the network needs only the teacher's parameters that the method wants,
    and the shapes of the teacher's activations for the same inputs.

    Args:
        student: the student.
        teacher: the teacher.
        method: the method of the last stage.

    Returns:
        The student itself if the method has no `deploy`; else a network whose
        variables `deployed_variables` collects.

    Raises:
        TypeError: if the method has a `deploy` and there is no teacher.
    """
    deploy = method.deploy
    if deploy is None:
        return student
    teacher = _needed("deployed", teacher)

    def shapes(inputs):
        variables = jax.eval_shape(teacher.init, jax.random.key(0), inputs)
        return jax.eval_shape(
            lambda variables: teacher.apply(
                *variables, inputs, wants=method.teacher, train=False
            )[0],
            variables,
        )

    def init(key, inputs):
        ours, theirs, own = jax.random.split(key, 3)
        variables, taught = student.init(ours, inputs), teacher.init(theirs, inputs)
        shown = jax.eval_shape(
            lambda variables: student.apply(
                *variables, inputs, wants=method.student, train=False
            )[0],
            variables,
        )
        regressors, memory = method.init(own, shown, shapes(inputs), None)
        return _joined(
            variables, regressors, memory, _params(teacher, method, taught, inputs)
        )

    def apply(params, state, inputs, *, wants, train, key=None):
        hints = tuple(path for path in wants.hints if path != OUTPUT)
        inner = wants._replace(output=False, hints=hints)
        shown, moved = student.apply(
            params["student"],
            state["student"],
            inputs,
            wants=union(method.student, inner),
            train=train,
            key=key,
        )
        output = None
        if wants.output or OUTPUT in wants.hints:
            zeros = jax.tree.map(
                lambda hint: jnp.zeros(hint.shape, hint.dtype), shapes(inputs).hints
            )
            taught = Features(hints=zeros, params=params["teacher"])
            output = deploy(params["regressors"], state["memory"], shown, taught)
        seen = {**shown.hints, OUTPUT: output}
        features = Features(
            output=output if wants.output else None,
            hints={path: seen[path] for path in wants.hints},
            params={path: shown.params[path] for path in wants.params},
        )
        return features, {**state, "student": moved}

    def layers(params, state, inputs):
        found = student.layers(params["student"], state["student"], inputs)
        wants = Wants(output=True)
        shown = jax.eval_shape(
            lambda *parts: apply(*parts, wants=wants, train=False)[0].output,
            *(params, state, inputs),
        )
        return {**{p: s for p, s in found.items() if not outermost(p)}, OUTPUT: shown}

    return Network(init, apply, layers)


def deployed_variables(
    state: State,
    method: Method,
    teacher: Network | None,
    variables: Variables | None,
    inputs: PyTree,
) -> Variables:
    """The variables of the network of `deployed`, from the last state of training.

    Args:
        state: the last state.
        method: the method of the last stage.
        teacher: the teacher.
        variables: the teacher's variables.
        inputs: example inputs; only their shapes matter.

    Returns:
        The student's variables if the method has no `deploy`; else the variables of the
        student, the regressors, the memory and the wanted parameters of the teacher.

    Raises:
        TypeError: if the method has a `deploy` and there is no teacher.
    """
    if method.deploy is None:
        return student_variables(state)
    return _joined(
        student_variables(state),
        state.params["regressors"],
        state.memory,
        _params(_needed("deployed_variables", teacher), method, variables, inputs),
    )


def _needed(caller: str, teacher: Network | None) -> Network:
    """The teacher; raises if there is none."""
    if teacher is None:
        do = "Give the teacher of the last stage."
        raise WrongType(message(caller, "teacher to be a Network", "None", do))
    return teacher


def _joined(
    student: Variables, regressors: PyTree, memory: PyTree, teacher: PyTree
) -> Variables:
    """The variables of the shipped network, from those of its parts."""
    return Variables(
        {"student": student.params, "regressors": regressors, "teacher": teacher},
        {"student": student.state, "memory": memory},
    )


def _params(
    teacher: Network, method: Method, variables: Variables | None, inputs: PyTree
) -> PyTree:
    """The teacher's parameters that the method wants, without any computation."""

    @jax.jit
    def wanted(variables, inputs):
        wants = Wants(params=method.teacher.params)
        return teacher.apply(*variables, inputs, wants=wants, train=False)[0].params

    return wanted(variables, inputs)
