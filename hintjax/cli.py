"""The command `hintjax`: distill, resume, eval, layers, methods, doctor."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from hintjax._checks import Refusal
from hintjax.experiments import config as configs
from hintjax.experiments.config import Config
from hintjax.experiments.distill import claim, distill, evaluate_run, resume
from hintjax.experiments.factories import layers, network
from hintjax.experiments.finished import load_student
from hintjax.experiments.launch import leaving, start
from hintjax.experiments.methods_table import show_methods
from hintjax.processes import first, told


@dataclasses.dataclass(frozen=True)
class Several:
    """One run by several processes; on the hosts of a Cloud TPU, without options."""

    coordinator: str | None = None
    """Where the first process is: host:port; it alone needs the run directory."""
    processes: int | None = None
    """How many processes there are; each is given the same command but for the next."""
    process: int | None = None
    """Which of them this is, from 0."""


def show_layers(
    model: str, shape: tuple[int, int, int] = (32, 32, 3), classes: int = 10
) -> None:
    """Lists every layer that can be a hint or guided layer, with its shape.

    Args:
        model: package.module:factory, or the directory of a finished run.
        shape: of one input.
        classes: what the factory is called with.
    """
    if ":" in model:
        found = network(model, classes)
    else:
        found, _ = load_student(model)
    for path, layer in layers(found, jax.numpy.zeros((1, *shape))).items():
        print(f"{path:40} {layer.shape[1:]}  {layer.dtype}")


def methods(*, markdown: bool = False) -> None:
    """Lists every method of `distill --method`.

    Args:
        markdown: print a Markdown table, which also has the papers and the files.
    """
    show_methods(markdown_page=markdown)


def doctor() -> None:
    """Says what a report of a problem should hold: versions, devices, disk."""
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for name in (
        *("hintjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex"),
        *("tensorflow-datasets", "grain", "tyro", "rich", "matplotlib"),
    ):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:20} {version}")
    for device in jax.devices():
        print(f"device       {device.id}: {device.device_kind} ({device.platform})")
    print(f"XLA_FLAGS    {os.environ.get('XLA_FLAGS', '')}")
    free = shutil.disk_usage(Path.cwd()).free
    writable = "writable" if os.access(Path.cwd(), os.W_OK) else "not writable"
    print(f"disk         {free / 2**30:.1f} GiB free here, {writable}")


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of the command."""
    with leaving():
        _main(argv)


def _main(argv):
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        default, argv = _from_file(argv)
        alone = Several()

        def distill_command(
            config: tyro.conf.OmitArgPrefixes[Config] = default,
            run_dir: Path | None = None,
            several: tyro.conf.OmitArgPrefixes[Several] = alone,
        ) -> None:
            """Distils a teacher into a student; without --method, compares methods.

            --config FILE takes a run's config.yaml for the defaults of all options.

            Args:
                config: what to run.
                run_dir: where all of it goes; by default a new directory in runs/.
                several: processes.
            """
            checked = configs.check(config)
            start(**dataclasses.asdict(several))
            path = Path(told(lambda: str(claim(run_dir, checked))))
            if first():
                print(f"run directory: {path}")
            distill(checked, path)

        def resume_command(
            run_dir: Path,
            devices: int | None = None,
            fsdp: int | None = None,
            several: tyro.conf.OmitArgPrefixes[Several] = alone,
        ) -> None:
            """Goes on with a run, or a comparison, where it stopped.

            Args:
                run_dir: its run directory.
                devices: another number of them than before.
                fsdp: another number of shares than before.
                several: processes.
            """
            start(**dataclasses.asdict(several))
            resume(run_dir, devices, fsdp)

        tyro.extras.subcommand_cli_from_dict(
            {
                "distill": distill_command,
                "resume": resume_command,
                "eval": evaluate_run,
                "layers": show_layers,
                "methods": methods,
                "doctor": doctor,
            },
            prog="hintjax",
            args=argv,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except KeyboardInterrupt as stopped:
        print(f"hintjax: stopped. {stopped}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except Refusal as error:
        # Every other error is a defect, whose traceback helps to mend it.
        print(f"hintjax: {error}", file=sys.stderr)
        sys.exit(2)


def _from_file(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Takes --config FILE off the arguments: it gives the defaults of the others."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return configs.load(argv[i + 1]), [*argv[:i], *argv[i + 2 :]]
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
            return configs.load(path), [*argv[:i], *argv[i + 1 :]]
    return Config(), list(argv)


if __name__ == "__main__":
    main()
