"""Where the parts of a step live: one device, or a mesh."""

import jax

from hintjax.networks import Variables
from hintjax.sharding import check_batch, check_spans


class Sharded:
    """`jax.jit` of a function of (state, teacher, batch), with shardings that follow
    from the shapes of its first arguments."""

    def __init__(self, function, mesh, shardings, donated):
        self.__wrapped__, self._mesh, self._donated = function, mesh, donated
        self._shardings, self._made = shardings, {}

    def __call__(self, state, variables, batch):
        jitted, arguments = self._prepared(state, variables, batch)
        return jitted(*arguments)

    def lower(self, state, variables, batch):
        jitted, arguments = self._prepared(state, variables, batch)
        return jitted.lower(*arguments)

    def _prepared(self, state, variables, batch):
        # Before jit looks at them, which would say it less well.
        check_batch(batch, self._mesh)
        check_spans(batch, self._mesh)
        variables = None if variables is None else Variables(*variables)
        structure = jax.tree.structure((state, variables))
        if structure not in self._made:
            shardings = self._shardings(state, variables)
            self._made[structure] = jax.jit(
                self.__wrapped__, **shardings, **self._donated
            )
        return self._made[structure], (state, variables, batch)
