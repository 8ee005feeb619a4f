"""The file report.html of a run or of a comparison, made from its files alone.

It needs no data, no networks and no network access.
"""

from collections.abc import Sequence
from pathlib import Path

from hintjax._checks import Refusal, message
from hintjax.experiments.comparison import REPORT
from hintjax.experiments.report.of_comparison import comparison_page
from hintjax.experiments.report.of_run import run_page
from hintjax.experiments.report.of_runs import runs_page
from hintjax.experiments.report.ran import named_apart, read_run
from hintjax.training.run_directory import replace_text

PAGE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Writes report.html of a finished run or comparison.

    Args:
        run_dir: its directory.

    Returns:
        The path of the report.

    Raises:
        Refusal: if the run or the comparison is not finished.
    """
    compared = (run_dir / REPORT).exists()
    made = comparison_page(run_dir) if compared else run_page(read_run(run_dir))
    replace_text(run_dir / PAGE, made)
    return run_dir / PAGE


def write_comparison(run_dirs: Sequence[Path], file: Path) -> Path:
    """Writes one report that compares finished runs.

    Args:
        run_dirs: the run directories, of runs with one dataset and one task.
        file: the file of the report.

    Returns:
        The path of the report.

    Raises:
        Refusal: if a run is not finished, or if they differ in dataset or task.
    """
    runs = [read_run(path) for path in run_dirs]
    for field in ("dataset", "task"):
        found = list(dict.fromkeys(getattr(run.config, field) for run in runs))
        if len(found) > 1:
            do = "Compare runs of one test split, or make a report of each."
            raise Refusal(message("report", f"runs of one {field}", f"{found}", do))
    replace_text(file, runs_page(named_apart(runs)))
    return file
