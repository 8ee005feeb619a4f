"""The command `hintjax`: distill, tune, suggest, resume, eval, layers, and others.

The others are methods, probe, report, export, measure, cache and doctor. Its exit
codes: 0 after success; 2 if it refuses the input; 3 if a run learned nothing (its
updates were skipped, because numbers were not finite); 130 after Ctrl-C and 143 after
SIGTERM, both once the run is saved; 141 if the reader of its output ended first
(`hintjax methods | head`); 1 after a defect, with a traceback.
"""

import contextlib
import itertools
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hintjax._checks import Refusal
from hintjax.experiments import config as configs
from hintjax.experiments.commands import commands
from hintjax.experiments.config import Config
from hintjax.experiments.devices import split_cpu
from hintjax.experiments.exporting import elsewhere
from hintjax.experiments.launch.ending import watch
from hintjax.experiments.launch.process import leaving, start
from hintjax.export import NoConverter
from hintjax.training import NothingLearned


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: arguments of the command; by default the arguments of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with leaving(), _piped():
        try:
            _run(argv)
        except KeyboardInterrupt as stopped:
            print(f"hintjax: stopped. {stopped}".rstrip(), file=sys.stderr)
            raise SystemExit(130) from stopped
        except NoConverter as error:
            code = elsewhere(argv, error)
            if code is None:
                print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(2 if code is None else code) from error
        except Refusal as error:
            # Every other error is a defect, whose traceback helps to mend it.
            print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except NothingLearned as error:
            print(f"hintjax: {error}", file=sys.stderr)
            raise SystemExit(3) from error


@contextlib.contextmanager
def _piped() -> Iterator[None]:
    """Ends the command without a traceback if the reader of its output ended first."""
    output, code = 1, 128 + signal.SIGPIPE  # the file descriptor; the exit code
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        reader = select.poll()
        reader.register(output, 0)
        if not any(event & select.POLLERR for _, event in reader.poll(0)):
            raise  # another pipe: a defect
        # Python flushes the output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        raise SystemExit(code) from error
    except SystemExit as ended:
        # rich has seen that the reader ended.
        if isinstance(ended.__context__, BrokenPipeError):
            raise SystemExit(code) from ended
        raise


def _run(argv: list[str]) -> None:
    """Reads the arguments, and runs the command that they name."""
    import tyro

    _join(argv)
    default, argv = _from_file(argv)
    tyro.extras.subcommand_cli_from_dict(
        commands(default),
        prog="hintjax",
        args=argv,
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def _join(argv: Sequence[str]) -> None:
    """Joins the other processes, before anything can fail in this process alone.

    A single process makes the cores of a CPU its devices.
    """
    if argv[:1] not in (["distill"], ["resume"]) or {"-h", "--help"} & {*argv}:
        return
    given: dict[str, Any] = {}
    words = [word for argument in argv[1:] for word in argument.split("=", 1)]
    for name, after in itertools.pairwise(words):
        if name in ("--coordinator", "--processes", "--process"):
            given[name.removeprefix("--")] = after
    for name in ("processes", "process"):
        if name in given:
            try:
                given[name] = int(given[name])
            except ValueError:
                return  # the options are read again, and then refused
    if not given:
        split_cpu()
    start(**given)
    watch()


def _from_file(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Takes --config FILE off the arguments, and reads the defaults from FILE.

    `tune` takes FILE as its first argument, too.
    """
    if argv[:1] == ["tune"] and argv[1:2] and not argv[1].startswith("-"):
        return configs.load(argv[1]), [argv[0], *argv[2:]]
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return configs.load(argv[i + 1]), [*argv[:i], *argv[i + 2 :]]
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
            return configs.load(path), [*argv[:i], *argv[i + 1 :]]
    return Config(), list(argv)


if __name__ == "__main__":
    main()
