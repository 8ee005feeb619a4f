"""The two stages of hint learning, as optax update steps.

The *hint stage* trains what feeds the guided layers, and the regressors, and
computes nothing above the hints in either network. The *distillation stage* trains
the whole student. Both are the same step,

    taught = teach(state, teacher, batch)          the teacher's features
    state, metrics = step(state, taught, batch)    one update of the student

and `update` is the jit of the two. The teacher is an argument: it is never
differentiated, never changed, and runs with `train=False`.

A step whose loss or gradient is not finite changes nothing but its number: parameters,
the optimiser's state, statistics and memory stay what they were, bit for bit, and
`State.skipped` counts it. `report` says which term of the objective it came from and
which layers it reached.

A batch is a dict: the inputs as "image" (or whatever `inputs` selects), what the
objective reads ("label", "index"), and optionally "where", the examples that count.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from hintjax._checks import Refusal, WrongType, mask, message, positive_int
from hintjax._numerics import either, masked_mean
from hintjax.method import Context, Method, one_per_example
from hintjax.networks import Features, Variables, Wants
from hintjax.sharding import (
    Layout,
    alike,
    check_batch,
    check_even,
    check_rules,
    over_batch,
    replicated,
    shares,
    spread,
    stored,
    whole,
)
from hintjax.stages import debugging
from hintjax.stages import report as reports
from hintjax.stages.accumulation import (
    entry,
    micro_batch,
    stacked,
    summed,
    valid,
    weighed,
)
from hintjax.stages.placement import Sharded
from hintjax.stages.skipping import all_finite, begin, judge
from hintjax.stages.skipping import check as check_guard
from hintjax.stages.stage import Skipped, Stage, State
from hintjax.stages.start import carried, copied


def check_kinds(caller, method, optimizer):
    """Raises if what has no checks of its own is another thing, or out of order."""
    for name, value, kind in (
        ("method", method, Method),
        ("optimizer", optimizer, optax.GradientTransformation),
    ):
        if not isinstance(value, kind):
            wanted = f"{name} to be a {kind.__name__}"
            raise WrongType(message(caller, wanted, type(value).__name__))


def make_stage(
    student,
    teacher,
    method,
    optimiser,
    inputs,
    teacher_inputs,
    mesh,
    accumulate,
    spikes,
):
    """The step that both stages are.

    `optimiser(objective, *parts)`, where parts are the objective's arguments or
    their shapes, says the optimiser, which parameters it changes, and which of the
    student's state is kept.
    """
    layout = Layout(mesh) if isinstance(mesh, Mesh) else mesh
    positive_int("stage", accumulate=accumulate)
    if spikes is not None:
        check_guard("stage", spikes)
    if teacher is None and method.teacher != Wants():
        raise ValueError(
            f"stage: expected a teacher, since the method wants {method.teacher} of "
            f"it, got None. Pass the teacher's network."
        )

    def taught_by(variables, batch):
        if method.teacher == Wants():
            return Features()
        if variables is None:
            do = "Pass what the teacher's init gave, or hintjax.split(flax_variables)."
            raise Refusal(message("stage", "the teacher's variables", "None", do))
        params, model_state = variables
        features, _ = teacher.apply(
            gathered({"teacher": params})["teacher"],
            model_state,
            teacher_inputs(split(batch)),
            wants=method.teacher,
            train=False,
        )
        return jax.lax.stop_gradient(features)

    def teach(state, variables, batch):
        if accumulate == 1:
            return taught_by(variables, batch)
        batch = shared(batch)

        def one(i):
            return taught_by(variables, micro_batch(batch, i, accumulate))

        return stacked(one, accumulate, layout)

    def objective(
        params, model_state, memory, taught, batch, key, step, *, train, number=None
    ):
        n = jax.tree.leaves(inputs(batch))[0].shape[0]
        mask("batch", batch.get("where"), (n,))
        ours, theirs = jax.random.split(jax.random.fold_in(key, step))
        shown, model_state = student.apply(
            params["student"],
            model_state,
            inputs(batch),
            wants=method.student,
            train=train,
            key=ours,
        )
        checks = number is not None and debugging.watching()
        apply = debugging.watched(method, number) if checks else method.apply
        values, memory, metrics = apply(
            params["regressors"],
            memory,
            shown,
            taught,
            batch,
            Context(theirs, step, train),
        )
        one_per_example("stage", "the method", values, n)
        loss = masked_mean(values, batch.get("where"))
        return loss, (model_state, memory, {**metrics, "loss": loss})

    def shared(batch):
        """A batch that can be cut into micro-batches."""
        parts = 1 if layout is None else shares(layout.mesh)
        many = f"{accumulate} micro-batches" + (f" on {parts} devices" * (parts > 1))
        check_even(batch, accumulate * parts, many)
        return split(batch)

    def split(batch):
        if layout is None:
            return batch
        check_batch(batch, layout.mesh)
        return jax.lax.with_sharding_constraint(batch, over_batch(layout.mesh))

    def gathered(params):
        """Parameters as a step computes with them, wherever they are stored."""
        if layout is None:
            return params
        return jax.lax.with_sharding_constraint(params, whole(stored(layout, params)))

    def parts_of(state, taught, batch):
        params = gathered(state.params)
        batch = split(batch)
        return params, state.state, state.memory, taught, batch, state.key, state.step

    def homes(state):
        """Where the parts of a state live."""
        params, everywhere = stored(layout, state.params), replicated(layout.mesh)
        memory = everywhere
        if method.split is not None:
            specs = method.split(state.memory)
            memory = jax.tree.map(partial(NamedSharding, layout.mesh), specs)
        return State(
            params=params,
            state=everywhere,
            memory=memory,
            opt_state=alike(params, state.params, state.opt_state, layout.mesh),
            step=everywhere,
            key=everywhere,
            skipped=everywhere,
            norms=everywhere,
        )

    def placed(grads):
        """Gradients where their parameters are stored."""
        if layout is None:
            return grads
        # First summed as they were computed: left to itself, the partitioner may
        # gather activations to compute each device's share of a gradient.
        grads = gathered(grads)
        return jax.lax.with_sharding_constraint(grads, stored(layout, grads))

    def learned(state, taught, batch, learn):
        """What `learn` finds in a batch, or the sum of what it finds in its parts.

        `learn(weigh, number, *parts)` gives means, weighed, and the student's state and
        the memory after them; `number` is that of an example in the batch, from its
        place in its part. The arguments of the first part come along.
        """
        if accumulate == 1:
            parts = parts_of(state, taught, batch)
            found, after = learn(_same_one, _same_one, *parts)
            return found, after, parts
        batch = shared(batch)
        counts = valid(batch, accumulate)
        params = gathered(state.params)

        def arguments(carry, i):
            model_state, memory = carry
            shown, part = entry(taught, i), split(micro_batch(batch, i, accumulate))
            key = jax.random.fold_in(state.key, i)
            return params, model_state, memory, shown, part, key, state.step

        def one(carry, i):
            weigh = partial(weighed, valid=counts[i], total=jnp.sum(counts))

            def number(place):
                return place * accumulate + i

            found, after = learn(weigh, number, *arguments(carry, i))
            return after, found

        carry = state.state, state.memory
        after, found = summed(one, carry, accumulate, layout)
        return found, after, arguments(carry, 0)

    def step(state, taught, batch):
        def learn(weigh, number, *parts):
            def loss(*parts):
                loss, (*after, metrics) = objective(*parts, train=True, number=number)
                return weigh(loss), (tuple(after), jax.tree.map(weigh, metrics))

            grads, (after, metrics) = jax.grad(loss, has_aux=True)(*parts)
            return (grads, metrics), after

        if debugging.watching():
            debugging.finite(
                "parameters", reports.by_layer(state.params, False), state.step
            )
        (grads, metrics), (model_state, memory), parts = learned(
            state, taught, batch, learn
        )
        if debugging.watching():
            debugging.finite("gradients", reports.by_layer(grads, False), state.step)
        transform, trained, kept = optimiser(objective, *parts)
        grads = placed(grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        moved = optax.apply_updates(state.params, updates)
        good, norms = all_finite((metrics["loss"], grads)), state.norms
        if spikes is not None:
            norm = reports.norm(grads)
            good, norms = judge(spikes, norms, norm, good)
            total = norms.spikes.astype(norm.dtype)
            metrics = {**metrics, "norm": norm, "spikes": total}
        if method.select is None:
            memory = either(good, memory, state.memory)
        else:
            memory = method.select(good, memory, state.memory, split(batch))
        after = State(
            params=either(good, _where(trained, moved, state.params), state.params),
            state=either(good, _where(kept, model_state, state.state), state.state),
            memory=memory,
            opt_state=either(good, opt_state, state.opt_state),
            step=state.step + 1,
            key=state.key,
            skipped=Skipped(
                state.skipped.total + jnp.where(good, 0, 1),
                jnp.where(good, 0, state.skipped.in_a_row + 1),
            ),
            norms=norms,
        )
        if layout is not None:
            after = jax.lax.with_sharding_constraint(after, homes(after))
        total = after.skipped.total.astype(metrics["loss"].dtype)
        return after, {**metrics, "skipped": total}

    @jax.jit  # made once, so that a second initialisation compiles nothing
    def fresh(key, student_variables, teacher_variables, batch, data, carry):
        """All that does not come from elsewhere: regressors, memory, optimiser."""
        params, model_state = student_variables
        taught = taught_by(teacher_variables, batch)
        shown, _ = student.apply(
            params, model_state, inputs(batch), wants=method.student, train=False
        )
        shapes = jax.eval_shape(lambda *features: features, shown, taught)
        own, theirs = jax.random.split(key)
        regressors, memory = copied(method.init(theirs, *shapes, data))
        if carry is not None:
            regressors, memory = carried((regressors, memory), carry)
        params = {"student": params, "regressors": regressors}
        zero = jnp.zeros((), jnp.int32)
        state = State(params, model_state, memory, (), zero, own, None)
        transform, _, _ = optimiser(objective, *parts_of(state, taught, batch))
        return regressors, memory, transform.init(params), state.step, own

    def init(key, student_variables, teacher_variables, batch, data=None, carry=None):
        if method.prepare is not None and carry is None:
            raise ValueError(
                "stage: expected carry=, the state of the stage before, got None. "
                "Train method.prepare in a hint_stage first."
            )
        variables = Variables(*copied(tuple(student_variables)))
        if carry is not None:
            carry = copied((carry.params["regressors"], carry.memory))
        regressors, memory, opt_state, step, key = fresh(
            key, variables, teacher_variables, batch, data, carry
        )
        params, model_state = variables
        params = {"student": params, "regressors": regressors}
        # Arrays of their own, since one buffer cannot be donated twice.
        skipped = Skipped(*(jnp.zeros((), jnp.int32) for _ in Skipped._fields))
        norms = () if spikes is None else begin()
        state = State(params, model_state, memory, opt_state, step, key, skipped, norms)
        if layout is None:
            return state
        theirs = None if teacher_variables is None else teacher_variables[0]
        check_rules(layout, {**params, "teacher": theirs})
        return spread(state, homes(state))

    def update(state, variables, batch):
        return step(state, teach(state, variables, batch), batch)

    def evaluate(state, variables, batch):
        parts = parts_of(state, taught_by(variables, batch), batch)
        _, (_, _, metrics) = objective(*parts, train=False, number=_same_one)
        return metrics

    def report(state, variables, batch):
        def learn(weigh, _, params, *rest):
            def losses(params):
                _, (_, _, metrics) = objective(params, *rest, train=True)
                return jax.tree.map(weigh, reports.losses_by_term(metrics))

            def gradient(name):
                # One loss at a time: as cotangents of the others, zeros times nan would
                # bring what is wrong in one term to all. What they share XLA computes
                # once.
                return jax.value_and_grad(lambda p: losses(p)[name])(params)

            found = {name: gradient(name) for name in jax.eval_shape(losses, params)}
            _, (*after, _) = objective(params, *rest, train=True)
            return found, tuple(after)

        taught = teach(state, variables, batch)
        found, _, _ = learned(state, taught, batch, learn)
        return reports.report(
            {name: (loss, placed(grads)) for name, (loss, grads) in found.items()}
        )

    def compiled(function, moves):
        """The jit of a function of (state, teacher, batch); one that moves the state
        gives it, too, and may reuse its memory."""
        donated = {"donate_argnums": 0} if moves else {}
        if layout is None:
            return jax.jit(function, **donated)
        everywhere = replicated(layout.mesh)

        def shardings(state, variables):
            ours, theirs = homes(state), None
            if variables is not None:
                params = stored(layout, {"teacher": variables[0]})["teacher"]
                theirs = Variables(params, everywhere)
            return {
                "in_shardings": (ours, theirs, over_batch(layout.mesh)),
                "out_shardings": (ours, everywhere) if moves else everywhere,
            }

        return Sharded(function, layout.mesh, shardings, donated)

    return Stage(
        init=init,
        teach=teach,
        step=step,
        update=compiled(update, True),
        evaluate=compiled(evaluate, False),
        report=compiled(report, False),
    )


def _same_one(x):
    return x


def _where(chosen: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """New leaves where chosen; the very same old ones elsewhere."""
    return jax.tree.map(lambda c, n, o: n if c else o, chosen, new, old)
