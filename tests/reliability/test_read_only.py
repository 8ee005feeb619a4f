"""What cannot be written is said before anything is trained, and nothing is lost."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import pytest

from hintjax.cli import main
from hintjax.training import load_tree, open_checkpoints, save_tree

pytestmark = pytest.mark.quick
NOBODY = 65534


@contextlib.contextmanager
def without_rights():
    """As a user without all rights: the superuser becomes another user here."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def folder():
    """A folder that anyone may enter, and only its owner may write."""
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        path.chmod(0o755)
        shutil.rmtree(path)


def read_only(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_run_directory_that_cannot_be_written_is_refused_at_once(folder, capsys):
    (folder / "run").mkdir()
    read_only(folder)
    for run_dir in (folder / "run", folder / "new"):
        with without_rights(), pytest.raises(SystemExit) as stopped:
            main(["distill", "--method", "kd", "--run-dir", str(run_dir)])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert "expected a run directory that can be written, got" in said
        assert str(run_dir) in said
    (folder / "run").chmod(0o755)


def test_what_is_read_only_can_be_read_and_stays_as_it_is(folder):
    tree = {"params": {"w": jnp.arange(3.0)}}
    save_tree(folder / "student", tree)
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, tree, {"at": 1})
    read_only(folder)
    try:
        with without_rights():
            assert load_tree(folder / "student")["params"]["w"].tolist() == [0, 1, 2]
            with open_checkpoints(folder / "checkpoints") as checkpoints:
                back, extra = checkpoints.restore(tree)
                assert extra == {"at": 1}
                assert back["params"]["w"].tolist() == [0, 1, 2]
                with pytest.raises(OSError, match="nothing was written"):
                    checkpoints.save(2, tree)
                assert checkpoints.steps() == [1]
            for path in (folder / "student", folder / "another"):
                with pytest.raises(OSError, match="nothing was written"):
                    save_tree(path, tree)
            assert load_tree(folder / "student")["params"]["w"].tolist() == [0, 1, 2]
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
