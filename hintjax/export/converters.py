"""Packages that convert and run files; each is imported where it is used, or never."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hintjax._checks import Refusal, message


class NoConverter(Refusal):
    """A `Refusal` of an export whose converter is not installed."""


def need(caller: str, *packages: str) -> None:
    """Raises unless these packages are installed.

    Args:
        caller: name of the function that the user called.
        *packages: names under which the packages are imported.

    Raises:
        NoConverter: if one is missing.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        wanted = f"the package {' and '.join(packages)}"
        got = f"no {' and no '.join(missing)}"
        do = "`./setup.sh --export` installs all converters in .venv-export."
        raise NoConverter(message(caller, wanted, got, do))


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the messages that C++ code writes to the standard error of the process."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
