"""The teacher that a config names."""

from pathlib import Path
from typing import NamedTuple


class Teacher(NamedTuple):
    """A teacher to train first, or the student of a finished run.

    Attributes:
        factory: package.module:factory of a teacher to train; None for a finished run.
        run_dir: run directory of a finished run; None for a factory.
    """

    factory: str | None
    run_dir: Path | None


def teacher_of(name: str) -> Teacher:
    """The teacher that `Config.teacher` names.

    >>> teacher_of("hintjax.models:plain_wide").factory
    'hintjax.models:plain_wide'
    >>> teacher_of("runs/first").run_dir.name
    'first'
    """
    return Teacher(name, None) if ":" in name else Teacher(None, Path(name))
