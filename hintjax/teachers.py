"""Several teachers, the student as its own teacher, and a moving average."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hintjax._checks import (
    Refusal,
    form,
    function,
    instance,
    message,
    nearest,
    scalar,
)
from hintjax.method import Method, union
from hintjax.networks import Features, Network, Variables, Wants
from hintjax.networks.network import read_variables
from hintjax.views import through


def together(**networks: Network) -> Network:
    """Joins several teachers, each with a name, into one network.

    The paths of its layers are `name/path`, and its output is a dict by name.
    `from_teacher` makes a method learn from one of the teachers::

        teacher = together(big=linen(wrn), vit=linen(vit))
        objective(
            kd=weighted(from_teacher(kd(4.0), "big"), 0.5),
            hint=weighted(from_teacher(fitnets([("block2", "block6")]), "vit"), 1.0),
        )

    Features that no method reads are not computed.

    Args:
        **networks: the networks. All receive the same inputs; see `seeing`.

    Returns:
        The network. Its variables hold the variables of each network by name:
        `Variables({name: params}, {name: state})`.

    Raises:
        ValueError: if there are no networks; when it is applied, if a path does not
            begin with one of the names.
    """
    if not networks:
        raise Refusal(message("together", "at least one network by name", "none"))
    instance("together", Network, **networks)

    def init(key, inputs):
        keys = jax.random.split(key, len(networks))
        made = {
            name: network.init(one, inputs)
            for one, (name, network) in zip(keys, networks.items(), strict=True)
        }
        params = {name: variables.params for name, variables in made.items()}
        return Variables(params, {name: made[name].state for name in made})

    def own(name: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            first = path.partition("/")[0]
            if first not in networks:
                near = ", ".join(nearest(first, networks))
                do = f"Nearest: {near}; say from_teacher(method, name)."
                wanted = "a path that begins with the name of a network"
                raise Refusal(message("together", wanted, repr(path), do))
        return tuple(p.removeprefix(f"{name}/") for p in paths if _is_of(name, p))

    def apply(params, state, inputs, *, wants, train, key=None):
        outputs, hints, kept, moved = {}, {}, {}, {}
        for number, (name, network) in enumerate(networks.items()):
            ours = Wants(wants.output, own(name, wants.hints), own(name, wants.params))
            shown, moved[name] = network.apply(
                params[name],
                state[name],
                inputs,
                wants=ours,
                train=train,
                key=None if key is None else jax.random.fold_in(key, number),
            )
            outputs[name] = shown.output
            hints |= {f"{name}/{path}": hint for path, hint in shown.hints.items()}
            kept |= {f"{name}/{path}": part for path, part in shown.params.items()}
        return Features(outputs if wants.output else None, hints, kept), moved

    def layers(params, state, inputs):
        return {
            f"{name}/{path}": layer
            for name, network in networks.items()
            for path, layer in network.layers(params[name], state[name], inputs).items()
        }

    return Network(init, apply, layers)


def seeing(network: Network, view: Callable[[PyTree], PyTree]) -> Network:
    """The same network on inputs that are passed through a function first.

    Use it if one of several teachers needs another resolution or normalization.

    Args:
        network: the network.
        view: `inputs -> inputs`.

    Returns:
        The network.
    """
    instance("seeing", Network, network=network)
    function("seeing", view=view)

    def apply(params, state, inputs, **how):
        return network.apply(params, state, view(inputs), **how)

    return Network(
        init=lambda key, inputs: network.init(key, view(inputs)),
        apply=apply,
        layers=lambda params, state, inputs: network.layers(
            params, state, view(inputs)
        ),
    )


def from_teacher(method: Method, name: str) -> Method:
    """The same method with one of several teachers.

    Args:
        method: any method. Its hint paths are paths inside that teacher.
        name: the name of the teacher in `together`.

    Returns:
        The method.

    >>> from hintjax.methods import fitnets
    >>> from_teacher(fitnets([("conv10", "group2")]), "big").teacher.hints
    ('big/group2',)
    """
    instance("from_teacher", Method, method=method)
    instance("from_teacher", str, name=name)
    wants = method.teacher

    def output(outputs):
        if not isinstance(outputs, Mapping) or name not in outputs:
            wanted = f"the outputs of together({name}=...)"
            do = "Make the teacher with together, or leave from_teacher out."
            raise Refusal(message("from_teacher", wanted, form(outputs), do))
        return outputs[name]

    def seen(features):
        return Features(
            output=output(features.output) if wants.output else None,
            hints={path: features.hints[f"{name}/{path}"] for path in wants.hints},
            params={path: features.params[f"{name}/{path}"] for path in wants.params},
        )

    made = through(
        method,
        lambda student, teacher: (student, seen(teacher)),
        again=lambda earlier: from_teacher(earlier, name),
    )
    hints, params = (
        tuple(f"{name}/{path}" for path in paths)
        for paths in (wants.hints, wants.params)
    )
    return made._replace(teacher=Wants(wants.output, hints, params))


def self_taught(method: Method) -> Method:
    """The same method with the student as its own teacher, from deep to shallow.

    The teacher's features are features of the student in the same forward pass, without
    gradient. So a shallow layer learns from a deep layer, or an early head (`at_head`)
    learns from the output. There is no second network: pass None as the teacher of a
    stage.

    Args:
        method: any method. Its hint layers are layers of the student.

    Returns:
        The method.

    References:
        Zhang et al. 2019, Be Your Own Teacher: Improve the Performance of Convolutional
        Neural Networks via Self Distillation.
    """
    instance("self_taught", Method, method=method)
    wants = method.teacher

    def seen(student):
        own = Features(
            output=student.output if wants.output else None,
            hints={path: student.hints[path] for path in wants.hints},
            params={path: student.params[path] for path in wants.params},
        )
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(own)):
            return own
        return jax.lax.stop_gradient(own)

    made = through(
        method, lambda student, teacher: (student, seen(student)), again=self_taught
    )
    return made._replace(student=union(method.student, wants), teacher=Wants())


def moving_average(
    teacher: Variables | Mapping[str, PyTree],
    student: Variables | Mapping[str, PyTree],
    decay: float = 0.999,
) -> Variables:
    """Updates a teacher that is the moving average of the student (EMA, mean teacher).

    teacher <- decay teacher + (1 - decay) student

    Start with a copy of the student, and call this function after every update::

        average = jax.jit(moving_average)
        teacher = jax.tree.map(jnp.copy, student_variables(state))
        state, metrics = stage.update(state, teacher, batch)
        teacher = average(teacher, student_variables(state))

    The copy is necessary: an update deletes the state that it receives, so the state
    and the teacher must not share arrays.

    Args:
        teacher: the teacher's variables; BatchNorm statistics are averaged too.
        student: the student's variables.
        decay: the fraction of the teacher that is kept, in [0, 1).

    Returns:
        The teacher's new variables. Arrays that are not floating point are copied from
        the student.

    >>> teacher, student = (Variables({"w": jnp.array(x)}, {}) for x in (1.0, 2.0))
    >>> moving_average(teacher, student, 0.75).params["w"].item()
    1.25

    References:
        Tarvainen and Valpola 2017, Mean Teachers are Better Role Models.
    """
    caller = "moving_average"
    teacher = read_variables(caller, "the teacher's", teacher)
    student = read_variables(caller, "the student's", student)
    scalar(caller, "in [0, 1)", lambda decay: 0 <= decay < 1, decay=decay)
    shapes = [jax.tree.map(jnp.shape, one) for one in (teacher, student)]
    if shapes[0] != shapes[1]:
        wanted = "teacher and student to have the same names and shapes"
        got = "variables of two different networks"
        raise Refusal(message(caller, wanted, got))

    def one(theirs, ours):
        if not jnp.issubdtype(ours.dtype, jnp.floating):
            return ours
        return theirs + jnp.asarray(1 - decay, theirs.dtype) * (ours - theirs)

    return jax.tree.map(one, teacher, student)


def _is_of(name: str, path: str) -> bool:
    """Whether the path of a layer begins with the name of a network."""
    return path.partition("/")[0] == name
