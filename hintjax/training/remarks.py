"""Remarks: sentences about a run that may save a day, said once and kept in a file.

remarks.txt in the run directory has one sentence in each line. A report shows them.
"""

import os
import sys
from pathlib import Path

from hintjax.processes import first

FILE = "remarks.txt"


def remark(run_dir: str | os.PathLike[str], *sentences: str) -> None:
    """Says each sentence once in the life of a run: on stderr, and in remarks.txt.

    Of several processes only the first speaks and writes.

    Args:
        run_dir: run directory.
        *sentences: each says what was seen and what to do.
    """
    if not first():
        return
    for sentence in dict.fromkeys(" ".join(one.split()) for one in sentences):
        if sentence in read_remarks(run_dir):
            continue
        print(f"hintjax: warning: {sentence}", file=sys.stderr)
        with (Path(run_dir) / FILE).open("a", encoding="utf-8") as file:
            file.write(f"{sentence}\n")


def read_remarks(run_dir: str | os.PathLike[str]) -> list[str]:
    """Reads the remarks of a run, oldest first."""
    path = Path(run_dir) / FILE
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
