"""The public names and their parameters, held against tests/public_api.txt.

A change of the public API changes that file, and so is seen in review. Write it anew:

    python tests/test_public_api.py > tests/public_api.txt
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

SNAPSHOT = Path(__file__).parent / "public_api.txt"
ROOMS = (
    *("losses", "methods", "regressors", "networks", "stages", "memory", "data"),
    *("cache", "metrics", "models", "weights", "sharding", "export", "population"),
    *("probes", "training", "similarity", "pairing"),
)


def lines() -> Iterator[str]:
    """One line for each public name, with its parameters or fields."""
    for room in ("", *ROOMS):
        module = import_module(f"hintjax.{room}".rstrip("."))
        for name in names(module):
            yield f"{module.__name__}.{name}{shape(getattr(module, name))}"


def names(module) -> list[str]:
    """The names in `__all__`, or else all that the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    )


def shape(value) -> str:
    """The parameters of a function, or the fields of a class."""
    if hasattr(value, "_fields"):
        return f"({', '.join(value._fields)})"
    kind = isinstance(value, type) and not issubclass(value, Exception)
    if not kind and not inspect.isfunction(value):
        return ""
    found = inspect.signature(value).parameters.values()
    return f"({', '.join(map(parameter, found))})"


def parameter(found: inspect.Parameter) -> str:
    """A parameter as it is written, without its annotation."""
    stars = {found.VAR_POSITIONAL: "*", found.VAR_KEYWORD: "**"}
    shown = stars.get(found.kind, "") + found.name
    if found.kind is found.KEYWORD_ONLY:
        shown = f"{shown}:"
    if found.default is not found.empty:
        default = found.default
        simple = default is None or isinstance(
            default, bool | int | float | str | tuple
        )
        shown += (
            f"={default!r}" if simple and "object at" not in repr(default) else "=..."
        )
    return shown


def test_the_public_api_is_the_committed_one():
    assert "\n".join(lines()) + "\n" == SNAPSHOT.read_text(encoding="utf-8")


def test_a_parameter_that_changes_is_seen():
    def before(a, *, b=1): ...
    def after(a, *, c=1): ...

    assert shape(before) == "(a, b:=1)" != shape(after)


if __name__ == "__main__":
    print(*lines(), sep="\n")
