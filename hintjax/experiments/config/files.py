"""A config in and out of YAML."""

import dataclasses
import itertools
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hintjax._checks import (
    LARGEST_FLOAT,
    FileRefusal,
    Refusal,
    WrongType,
    described,
    message,
    nearest,
)
from hintjax.experiments.config.checks import check
from hintjax.experiments.config.options import Config
from hintjax.training.run_directory import write_text

FILE = "config.yaml"
# Errors of PyYAML's conversions, besides its own errors.
_NO_YAML = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


def save(config: Config, run_dir: str | os.PathLike[str]) -> None:
    """Writes config.yaml into a run directory."""
    import yaml

    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    write_text(Path(run_dir) / FILE, text)


def load(path: str | os.PathLike[str]) -> Config:
    """Reads a config from a YAML file or from a run directory.

    Raises:
        FileRefusal: if there is no such file.
        Refusal: for an unknown key (the error names the nearest keys), or a value of
            the wrong type or range.
        WrongType: if the file does not hold names and values.
    """
    import yaml

    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        do = "Pass a run directory of hintjax, or a YAML file."
        raise FileRefusal(message("config", f"a file {path}", "nothing", do))
    try:
        text = path.read_text(encoding="utf-8")
        node, fields = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, *_NO_YAML) as error:
        got = " ".join(str(error).split())[:300]
        raise Refusal(message("config", f"plain YAML in {path}", got)) from None
    if not isinstance(fields, Mapping):
        got = type(fields).__name__
        raise WrongType(message("config", f"names and values in {path}", got))
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(set(names)) < len(names):
        wanted = f"each name once in {path}"
        got = described(max(names, key=names.count))
        raise Refusal(message("config", wanted, f"{got} again"))
    return from_dict(fields)


def from_dict(fields: Mapping[str, Any]) -> Config:
    """A config from plain names and values, each checked.

    >>> from_dict({"epochs": 3, "hint_epochs": 1}).epochs
    3
    >>> from_dict({"epoch": 3})
    Traceback (most recent call last):
    ...
    hintjax._checks.Refusal: config: expected a known key, got 'epoch'. Nearest: ...
    """
    types_of = typing.get_type_hints(Config)
    given = {}
    for name, value in fields.items():
        if name not in types_of:
            do = f"Nearest: {', '.join(nearest(str(name)[:80], types_of))}."
            raise Refusal(message("config", "a known key", described(name), do))
        given[name] = _typed(name, value, types_of[name])
    return check(Config(**given))


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """The value as the type that the field has; lists become tuples."""
    options = typing.get_args(wanted) if _is_union(wanted) else (wanted,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            item, _ = typing.get_args(option)
            if isinstance(value, (list, tuple)):
                return tuple(_typed(name, one, item) for one in value)
        elif option is float and type(value) is int and abs(value) <= LARGEST_FLOAT:
            return float(value)
        elif type(value) is option:  # so that a bool is no int
            return value
    names = " or ".join(itertools.chain(*map(_names, options)))
    raise Refusal(message("config", f"{name} to be {names}", described(value)))


def _names(option: Any) -> Sequence[str]:
    """The values or the type that an error names."""
    if typing.get_origin(option) is Literal:
        return typing.get_args(option)
    return [getattr(option, "__name__", str(option))]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
