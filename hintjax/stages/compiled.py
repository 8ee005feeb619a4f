"""The compiled functions of a stage, which look at their arguments on the host."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hintjax._checks import Refusal
from hintjax.stages import entering
from hintjax.stages.stage import Batch, Given, State


class Compiled:
    """A compiled function of (state, teacher, batch), with a sentence for each refusal.

    The function is traced once for each form of its arguments, and the checks of
    `entering` run then. Two things need a look before: arguments that cannot be traced,
    such as texts, and the numbers of a batch. Only arrays of NumPy are looked into,
    since reading an array of JAX would wait for its device.

    Attributes:
        lower: `(state, teacher, batch)`: as `lower` of `jax.jit`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        limits: Callable[[dict], dict[str, int]] | None = None,
    ):
        """Takes the compiled function, and `Method.limits`, if it trains."""
        self.__wrapped__ = inspect.unwrap(function)
        self._function, self._limits = function, limits

    def __call__(self, state: State, variables: Given | None, batch: Batch) -> Any:
        """Returns the result of the function."""
        if self._limits is not None:
            entering.check_state(state)
            if isinstance(batch, Mapping):
                limits = self._limits(state.memory)
                entering.check_limits(batch, limits, entering.is_numpy)
        try:
            return self._function(state, variables, batch)
        except (TypeError, AttributeError) as error:
            if not isinstance(error, Refusal):
                entering.check_state(state)
                entering.check_arrays("the teacher's", entering.teacher(variables))
                entering.check_batch(batch)
            raise

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the compiled function, such as `lower`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._function, name)
