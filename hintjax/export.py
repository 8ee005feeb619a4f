"""What is shipped: the student alone, or the network that its method says.

Most methods leave a student that stands alone (`student_variables`). SimKD's is served
with the projector and the teacher's classifier: a method says so by its `deploy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax.method import Method, union
from hintjax.networks import Features, Network, Variables, Wants
from hintjax.stages import State, student_variables


def deployed(student: Network, teacher: Network | None, method: Method) -> Network:
    """The network that is shipped after training with a method.

    Its output is what the method's `deploy` says; its layers are the student's. The
    teacher is not run: of its parameters only those are needed that the method wants,
    and of its activations the shapes, for the same inputs.

    Args:
        student: the student.
        teacher: the teacher.
        method: of the last stage.

    Returns:
        The student itself, for a method that deploys it alone; else a network whose
        variables `deployed_variables` collects.
    """
    if method.deploy is None:
        return student

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
        shown, moved = student.apply(
            params["student"],
            state["student"],
            inputs,
            wants=union(method.student, wants._replace(output=False)),
            train=train,
            key=key,
        )
        output = None
        if wants.output:
            zeros = jax.tree.map(
                lambda hint: jnp.zeros(hint.shape, hint.dtype), shapes(inputs).hints
            )
            taught = Features(hints=zeros, params=params["teacher"])
            output = method.deploy(params["regressors"], state["memory"], shown, taught)
        features = Features(
            output=output,
            hints={path: shown.hints[path] for path in wants.hints},
            params={path: shown.params[path] for path in wants.params},
        )
        return features, {**state, "student": moved}

    def layers(params, state, inputs):
        return student.layers(params["student"], state["student"], inputs)

    return Network(init, apply, layers)


def deployed_variables(
    state: State,
    method: Method,
    teacher: Network | None,
    variables: Variables | None,
    inputs: PyTree,
) -> Variables:
    """The variables of `deployed`, from the last state of training.

    Args:
        state: the last state.
        method: of its stage.
        teacher: the teacher.
        variables: the teacher's.
        inputs: an example of the inputs, for shapes.

    Returns:
        The student's own for a method that deploys it alone.
    """
    if method.deploy is None:
        return student_variables(state)
    return _joined(
        student_variables(state),
        state.params["regressors"],
        state.memory,
        _params(teacher, method, variables, inputs),
    )


def _joined(student, regressors, memory, teacher):
    return Variables(
        {"student": student.params, "regressors": regressors, "teacher": teacher},
        {"student": student.state, "memory": memory},
    )


def _params(teacher, method, variables, inputs):
    """Those of the teacher's parameters that the method wants; nothing is computed."""

    @jax.jit
    def wanted(variables, inputs):
        wants = Wants(params=method.teacher.params)
        return teacher.apply(*variables, inputs, wants=wants, train=False)[0].params

    return wanted(variables, inputs)
