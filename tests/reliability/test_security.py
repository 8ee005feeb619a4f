"""Nothing that is read can run code, and nothing is written outside its place."""

import ast
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hintjax.cli import main
from hintjax.experiments import config
from hintjax.training import DamageError, load_tree, open_checkpoints, save_tree

pytestmark = pytest.mark.quick

PACKAGE = Path(config.__file__).parent
BANNED_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
BANNED_CALLS = {
    *("eval", "exec", "os.popen", "os.system", "torch.load"),
    *("yaml.full_load", "yaml.load", "yaml.unsafe_load"),
}


def complaints(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            yield from names & BANNED_MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {node.module} & BANNED_MODULES
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in BANNED_CALLS:
                yield called
            if called == "np.load" and given.get("allow_pickle") != "False":
                yield "np.load that may read pickles"
            if given.get("shell", "False") != "False":
                yield "a shell"
            if called.endswith(".extractall") and "filter" not in given:
                yield "an archive that may write anywhere"


def test_the_package_has_no_way_to_run_what_it_reads():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert list(complaints(path.read_text(encoding="utf-8"))) == [], path


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "eval(text)"),
        *("np.load(path)", "yaml.load(text)", "run(command, shell=True)"),
        *("archive.extractall(path)", "torch.load(path)", "np.load(p, allow_pickle=x)"),
    ],
)
def test_what_is_banned_is_seen(line):
    assert list(complaints(line))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("place", ["run/1", "student"])
def test_what_others_put_into_a_checkpoint_is_not_read(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"w": jnp.arange(3.0)}
    with open_checkpoints("run") as checkpoints:
        checkpoints.save(1, tree)
    save_tree("student", tree)

    def read():
        if place == "student":
            return load_tree(place)
        return open_checkpoints("run").restore(tree)[0]

    # Orbax looks for some of these before it looks at its own.
    for name in ("data.pkl", "aggregate", "d/more", "sitecustomize.py"):
        Path(place, name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DamageError, match=f"{name}.*was not written there"):
            read()
        Path(place, name).unlink()
    Path(place, "passwd").symlink_to("/etc/passwd")
    with pytest.raises(DamageError, match="passwd"):
        read()
    Path(place, "passwd").unlink()
    Path(place, ".DS_Store").touch()  # what file systems and their tools leave
    np.testing.assert_array_equal(read()["w"], tree["w"])
    assert not Path("exploded").exists()


def test_the_whole_suite_runs_without_unpickling():
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(pickle.dumps(1))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch exploded']",
        "dataset: !!python/object/apply:os.system ['touch exploded']",
        "dataset: !import_call {key: os.system, init: {args: [touch exploded]}}",
    ],
)
def test_a_config_that_would_run_something_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config: expected plain YAML"):
        config.load("config.yaml")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../../x"])
def test_a_name_cannot_leave_the_folder_of_runs(name, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    (root / "runs").mkdir(parents=True)
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit):
        main(["distill", "--method", name])
    assert "hintjax: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")][:2] == ["root", "runs"]
    assert not list(tmp_path.glob("x*"))


def test_no_file_that_is_shipped_tells_where_it_was_written(tmp_path):
    secret = tmp_path / "a-secret-project"
    tree = {"params": {"w": np.ones(3, np.float32)}}
    save_tree(secret / "student", tree)
    with open_checkpoints(secret / "checkpoints") as checkpoints:
        checkpoints.save(1, tree)
    files = [path for path in secret.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        assert secret.name.encode() not in path.read_bytes(), path
    load_tree(secret / "student")
