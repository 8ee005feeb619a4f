"""`--cache`: the teacher runs once, and the results are those of the live teacher."""

import json

import jax
import numpy as np
import pytest

from hintjax import cache as caches
from hintjax.cache import shards
from hintjax.cli import main
from hintjax.data import ON_DEVICE
from hintjax.experiments import caching, setting
from hintjax.training import fingerprint, load_tree

TINY = (
    *("--student", "hintjax.models:plain_wide", "--batch-size", "16", "--pad", "1"),
    *("--epochs", "4", "--teacher-epochs", "1", "--devices", "1", "--views", "2"),
)


@pytest.fixture(scope="module")
def live(corners, tmp_path_factory):
    """A run whose teacher is live, with fixed views."""
    run_dir = tmp_path_factory.mktemp("live") / "run"
    common = ("--dataset", corners, *TINY, "--run-dir", str(run_dir))
    main(["distill", "--method", "fitnets", *common])
    return run_dir


def cached(live, corners, run_dir, *options):
    main(
        [
            *("distill", "--method", "fitnets", "--cache", "--dataset", corners, *TINY),
            *("--teacher", str(live / "teacher"), "--run-dir", str(run_dir), *options),
        ]
    )
    return run_dir


@pytest.mark.bits
def test_a_cached_run_has_the_bits_of_a_live_run(
    live, corners, tmp_path, monkeypatch, capsys
):
    run_dir = cached(live, corners, tmp_path / "cached")
    assert "cache of the teacher: 2 x" in capsys.readouterr().out
    ours, theirs = (fingerprint(load_tree(run / "student")) for run in (run_dir, live))
    assert ours == theirs
    same = [json.loads((run / "result.json").read_text()) for run in (run_dir, live)]
    tests = [{k: v for k, v in r.items() if k.startswith("test")} for r in same]
    assert tests[0] == tests[1]
    main(["cache", "verify", str(run_dir)])
    said = capsys.readouterr().out
    assert "largest error 0 " in said and "least cosine 1.0" in said
    check, checked = shards._check, []
    monkeypatch.setattr(shards, "_check", lambda *of: (checked.append(of), check(*of)))
    monkeypatch.setattr(caching, "_seconds", None)  # the teacher is not timed
    main(["resume", str(run_dir)])
    assert "on the device; complete" in capsys.readouterr().out
    assert len(checked) == len(list((run_dir / "cache").glob("rows-*.npy")))
    shard = next((run_dir / "cache").glob("rows-*.npy"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "verify", str(run_dir)])
    assert stopped.value.code == 2


def test_rows_that_do_not_fit_on_the_device_come_with_the_batches(
    live, corners, tmp_path, monkeypatch, capsys
):
    read = []
    rows_of = caches.Rows.read

    def counted(rows, index, view):
        read.append(len(index))
        return rows_of(rows, index, view)

    monkeypatch.setattr(caches.Rows, "read", counted)
    monkeypatch.setattr(caching, "ON_DEVICE", 1)
    monkeypatch.setattr(caching, "IN_MEMORY", 2)
    run_dir = cached(live, corners, tmp_path / "run", "--cache-dtype", "int8")
    assert "on disk" in capsys.readouterr().out
    assert set(read) == {16} and ON_DEVICE > 1
    assert (run_dir / "result.json").exists()


def test_a_cache_of_other_data_is_refused(live, corners, tmp_path, capsys):
    run_dir = cached(live, corners, tmp_path / "run", "--epochs", "2")
    identity = json.loads((run_dir / "cache" / "cache.json").read_text())
    changed = identity | {"crops": identity["crops"] + 1}
    (run_dir / "cache" / "cache.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        main(["cache", "verify", str(run_dir)])
    assert "with crops" in capsys.readouterr().err


def test_a_cache_that_does_not_fit_on_the_disk_names_its_size(
    live, corners, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(caching, "_FREE", 0.0)
    with pytest.raises(SystemExit):
        cached(live, corners, tmp_path / "run")
    said = capsys.readouterr().err
    assert "MB free" in said and "--cache-dtype" in said


@pytest.fixture
def passes(monkeypatch):
    """The batch size of each forward pass of the teacher, as the passes happen."""
    found, network_of = [], setting.teacher_network

    def counted(*arguments):
        network = network_of(*arguments)

        def apply(params, state, inputs, **how):
            size = len(inputs)
            jax.debug.callback(lambda: found.append(size))
            return network.apply(params, state, inputs, **how)

        return network._replace(apply=apply)

    monkeypatch.setattr(setting, "teacher_network", counted)
    return found


def test_a_comparison_shares_one_cache(live, corners, tmp_path, passes, capsys):
    """No step of three arms with two seeds runs the teacher."""
    run_dir = tmp_path / "compare"
    main(
        [
            *("distill", "--compare", "backprop", "kd", "at", "--seeds", "2"),
            *("--cache", "--dataset", corners, *TINY, "--run-dir", str(run_dir)),
            *("--teacher", str(live / "teacher")),
        ]
    )
    assert capsys.readouterr().out.count("cache of the teacher") == 1
    assert [path.parent for path in run_dir.rglob("cache.json")] == [run_dir / "cache"]
    report = json.loads((run_dir / "report.json").read_text())
    assert all(len(row["seeds"]) == 2 for row in report["rows"])
    jax.effects_barrier()
    # Two passes measure the time. Of 16 shards one has rows of both views.
    assert passes.count(16) == 2 + 16 + 1
    assert len(list((run_dir / "cache").glob("rows-*.npy"))) == 16


def test_equal_features_have_cosine_1():
    x = np.array([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    y = np.array([[2.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    found = caching.cosines(x, y)
    np.testing.assert_allclose(found, [1.0, 1.0, 0.0], rtol=1e-6)
