"""One process that times programs when another process asks for it.

`against_torch.py` compares programs of two environments, so each has its own process.
Only one of them works at a time, and the order is the asking process's choice. This
file imports nothing but Python's own modules, so that every environment can read it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def serve(programs: Mapping[str, Callable[[int], float]], about: dict) -> None:
    """Times the programs that the other process names, until its input ends.

    Args:
        programs: `number of steps -> seconds for each step`, by name.
        about: facts about this process, which are sent first.
    """
    answer = sys.stdout
    sys.stdout = sys.stderr  # only answers may be read as answers
    print(
        json.dumps({"programs": [*programs], "about": about}), file=answer, flush=True
    )
    for line in sys.stdin:
        name, steps = json.loads(line)
        print(json.dumps(programs[name](steps)), file=answer, flush=True)


class Worker:
    """The asking side of a process that runs `serve`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts the process, and waits until its programs are compiled.

        Args:
            command: the program and its arguments.
            environment: variables that are set beside those of this process.
        """
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        told = self._read()
        self.programs: list[str] = told["programs"]
        self.about: dict[str, Any] = told["about"]

    def seconds(self, name: str, steps: int) -> float:
        """The seconds for each of so many steps of a program."""
        self._process.stdin.write(json.dumps([name, steps]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(
                f"{' '.join(self._process.args)}: expected an answer, got the end of "
                f"the process (exit code {self._process.returncode}); see its error."
            )
        return json.loads(line)
