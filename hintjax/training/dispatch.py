"""How many steps one dispatch makes, and how far the host runs ahead."""

import math
import time

BEHIND = 1.0  # seconds of work that a signal may have to wait for
MEASURED = 8  # single steps that say how long a step takes on this accelerator


class Timer:
    """Seconds and calls since it was made."""

    def __init__(self):
        self._start, self._calls = time.perf_counter(), 0

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def calls(self) -> int:
        self._calls += 1
        return self._calls

    def steps_in_a_second(self) -> int:
        steps = self._calls / max(self.seconds(), 1e-9)
        return 2 ** int(math.log2(min(max(steps, 1), 256)))
