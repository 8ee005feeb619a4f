"""The teacher that a config names: a factory, a finished run, or a file of weights."""

from pathlib import Path
from typing import NamedTuple


class Teacher(NamedTuple):
    """A teacher: a factory to train first or with weights, or a finished run.

    Attributes:
        factory: package.module:factory of a teacher; None for a finished run.
        run_dir: run directory of a finished run; None for a factory.
        weights: safetensors file with weights of torch for the factory; None for a
            teacher to train.
    """

    factory: str | None
    run_dir: Path | None
    weights: Path | None = None

    @property
    def trained_here(self) -> bool:
        """Whether the run trains the teacher first."""
        return self.factory is not None and self.weights is None


def teacher_of(name: str, weights: str | None = None) -> Teacher:
    """The teacher that `Config.teacher` and `Config.weights` name.

    >>> teacher_of("hintjax.models:plain_wide").factory
    'hintjax.models:plain_wide'
    >>> teacher_of("runs/first").run_dir.name
    'first'
    """
    if ":" not in name:
        return Teacher(None, Path(name))
    return Teacher(name, None, Path(weights).expanduser() if weights else None)
