"""The compiled functions of a stage, which look at their arguments on the host."""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from hintjax._checks import Refusal
from hintjax.sharding import in_automatic_mesh, is_explicit, on_automatic
from hintjax.stages import entering
from hintjax.stages.stage import Batch, Given


class Compiled:
    """A compiled function of (state, teacher, batch), with a sentence for each refusal.

    The function is traced once for each form of its arguments, and the checks of
    `entering` run then. Three things need a look before: arguments that cannot be
    traced, such as texts; arrays on a mesh with Explicit axes, which are seen as on
    Auto axes; and the numbers of a batch. Only arrays of NumPy are looked into, since
    reading an array of JAX would wait for its device.

    Attributes:
        lower: `(state, teacher, batch)`: as `lower` of `jax.jit`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        limits: Callable[[dict], dict[str, int]] | None = None,
        check: Callable[[Any], None] = entering.check_state,
        home: NamedSharding | None = None,
    ):
        """Takes the compiled function.

        Args:
            function: the compiled function.
            limits: `Method.limits`, if the function trains.
            check: raises unless its argument is what the function takes as the state.
            home: where the function takes the teacher and the batch, if the user may
                have placed them elsewhere on a mesh.
        """
        self.__wrapped__ = inspect.unwrap(function)
        self._function, self._limits, self._check = function, limits, check
        self._home = home

    def __call__(self, state: Any, variables: Given | None, batch: Batch) -> Any:
        """Returns the result of the function."""
        self._check(state)
        if self._limits is not None and isinstance(batch, Mapping):
            # A state of another stage, without this memory, is refused later.
            with contextlib.suppress(KeyError):
                limits = self._limits(state.memory)
                entering.check_limits(batch, limits, entering.is_numpy)
        return self._made(self._function, state, variables, batch)

    def lower(self, state: Any, variables: Given | None, batch: Batch) -> Any:
        """Lowers the function for these arguments, as `jax.jit(...).lower` does."""
        return self._made(self._function.lower, state, variables, batch)

    def _made(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function; only an error makes it look for wrong arguments."""
        state, variables, batch = arguments
        with in_automatic_mesh():
            # A user places a whole tree, so the first array of the others will do.
            first = [*jax.tree.leaves(state)[:1], *jax.tree.leaves(variables)[:1]]
            if any(map(is_explicit, [*first, *jax.tree.leaves(batch)])):
                arguments = on_automatic(arguments)
            if self._home is not None:
                arguments = (arguments[0], *_moved(arguments[1:], self._home))
            try:
                return function(*arguments)
            except (TypeError, AttributeError) as error:
                if not isinstance(error, Refusal):
                    entering.check_arrays("the teacher's", entering.teacher(variables))
                    entering.check_batch(batch)
                raise


def _moved(tree: PyTree, home: NamedSharding) -> PyTree:
    """The same arrays; those that are elsewhere on a mesh are sent to their home."""

    def one(leaf: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if not placed or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.device_put(leaf, home)

    return jax.tree.map(one, tree)
