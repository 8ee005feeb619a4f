"""Checkpoints: equal bits, never skipped, never in part, and whole after a kill."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1

from hintjax.sharding import data_mesh
from hintjax.training import (
    DamageError,
    checkpoints,
    fingerprint,
    load_tree,
    open_checkpoints,
    save_tree,
)

ROOT = Path(checkpoints.__file__).parents[2]
SMALL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


class State(NamedTuple):
    params: dict
    state: dict
    memory: dict
    opt_state: tuple
    step: jax.Array
    key: jax.Array


def make_state(scale: float = 1.0) -> State:
    params = {
        "student": {"conv.1": {"kernel": scale * jnp.ones((2, 3)), "bias": None}},
        "regressors": {"fitnets": {"group2/conv->group2": scale * jnp.arange(4.0)}},
    }
    tx = optax.chain(optax.adamw(optax.linear_schedule(1e-3, 0.0, 9)), optax.trace(0.9))
    return State(
        params=params,
        state={},
        memory={"half": jnp.full(3, scale / 3, jnp.bfloat16), "none": None, "{}": {}},
        opt_state=tx.init(params),
        step=jnp.int32(7),
        key=jax.random.key(3),
    )


def bits(leaf) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)
        if isinstance(a, jax.Array):
            assert (a.sharding, a.committed) == (b.sharding, b.committed)


def names(directory) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


# What comes back


@pytest.mark.quick
def test_everything_comes_back_bit_for_bit(tmp_path):
    state, extra = make_state(), {"stage": "hint", "best": float("inf"), "a": [1, None]}
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(jnp.int32(5), state, extra)
    restored, got = checkpoints.restore(make_state(0.0))
    assert_same(restored, state)
    assert got == extra
    abstract = jax.eval_shape(make_state)
    chex.assert_trees_all_equal(checkpoints.restore(abstract)[0].params, state.params)


def test_every_dtype_and_every_bit_of_it(tmp_path):
    odd = np.array([0x7FC00001, 0x80000000, 0xFF800000, 1], np.uint32)  # nan, -0, -inf
    tree = {
        "odd": jnp.asarray(odd.view(np.float32)),
        "zeros": jnp.zeros((2, 2)),
        "minus": -jnp.zeros((2, 2)),
        "nothing": jnp.zeros((0, 3), jnp.bfloat16),
        "rbg": jax.random.key(1, impl="rbg"),
        "keys": jax.random.split(jax.random.key(1), (2, 2)),
        "numpy": np.arange(3, dtype=np.float64),
        "number": np.int32(4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    for dtype in ("bool", "int4", "int8", "uint16", "float16", "float8_e4m3fn"):
        tree[dtype] = jnp.ones(3, dtype)
    tree["complex64"] = jnp.full(2, 1 - 2j)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(0, tree)
    assert_same(checkpoints.restore(tree)[0], tree)


def test_shardings_weak_types_and_uncommitted_arrays_are_those_of_like(tmp_path):
    mesh = data_mesh()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tree = {
        "rows": jax.device_put(jnp.arange(16.0), rows),
        "copies": jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec())),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), rows),
        "weak": jnp.asarray(0.1),
        "weak_rows": jnp.full((2, 3), 2),
        "free": jnp.arange(3.0),
        "bound": jax.device_put(jnp.ones(2), jax.devices()[3]),
    }
    assert tree["weak"].weak_type and tree["weak_rows"].weak_type
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(0, tree)
    restored, _ = checkpoints.restore(tree)
    assert_same(restored, tree)
    for name, array in tree.items():
        if name != "keys":
            assert restored[name].weak_type == array.weak_type
    # 8 devices to 1, and to shardings that only `like` knows.
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.items()}
    like["free"] = jax.ShapeDtypeStruct(
        (3,), "float32", sharding=tree["copies"].sharding
    )
    other, _ = checkpoints.restore(like)
    assert other["rows"].sharding == jnp.zeros(1).sharding
    assert other["free"].sharding == tree["copies"].sharding
    chex.assert_trees_all_equal(other["rows"], tree["rows"])


@pytest.mark.quick
def test_the_next_step_may_take_the_arrays_at_once(tmp_path):
    @jax.jit
    def first(state):
        return jax.tree.map(lambda x: x + 1, state)

    step = jax.jit(lambda t: jax.tree.map(lambda x: x * 2 + 1, t), donate_argnums=0)
    state = first({"w": jnp.zeros(200_000), "n": jnp.int32(0)})
    host = np.zeros(3)
    with open_checkpoints(tmp_path, keep=9) as checkpoints:
        for k in range(4):
            donated = state
            checkpoints.save(k, state | {"host": host})
            state = step(state)
            assert donated["w"].is_deleted()  # the copy does not stand in the way
            host += 1
    for k, (value, count) in enumerate([(1, 0), (3, 1), (7, 2), (15, 3)]):
        # Donated arrays do as `like`.
        got, _ = checkpoints.restore(donated | {"host": host}, k)
        np.testing.assert_array_equal(got["w"], np.full(200_000, value))
        np.testing.assert_array_equal(got["host"], np.full(3, count))
        state = step({"w": got["w"], "n": got["n"]})  # and what came back is donated
        np.testing.assert_array_equal(state["w"], np.full(200_000, 2 * value + 1))


def test_two_stages_in_one_directory_are_told_apart_by_peek(tmp_path):
    hint = {"student": jnp.ones(2), "regressors": {"pair": jnp.ones(3)}}
    distillation = {"student": jnp.zeros(2)}
    extra = {"stage": "hint", "iterator": '{"position": 3}', "scores": [0.5]}
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, hint, extra)
        extra["scores"].append(1.0)  # what is saved is what was given
        checkpoints.save(20, distillation, {"stage": "distillation"})
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.peek(10)["scores"] == [0.5]
    assert checkpoints.peek() == {"stage": "distillation"}
    assert_same(checkpoints.restore(hint, 10)[0], hint)
    assert_same(checkpoints.restore(distillation)[0], distillation)
    shutil.rmtree(tmp_path / "20" / "d")
    assert checkpoints.peek()["stage"] == "distillation"  # the tree is not read


# Saving


def during_saves(monkeypatch, act):
    save = ocp.Checkpointer.save

    def act_and_save(*args, **kwargs):
        act()
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", act_and_save)


def test_a_save_in_flight_is_waited_for_and_none_is_skipped(tmp_path, monkeypatch):
    event = threading.Event()
    during_saves(monkeypatch, lambda: event.wait(10))
    checkpoints = open_checkpoints(tmp_path, keep=9)
    checkpoints.save(0, SMALL)
    assert names(tmp_path) == [".hintjax-tmp"]  # it returned while nothing is written
    checkpoints.poll()  # nor does this wait
    threading.Timer(0.2, event.set).start()
    for step in range(1, 5):
        checkpoints.save(step, SMALL)
    assert checkpoints.steps() == [0, 1, 2, 3, 4]
    assert names(tmp_path) == ["0", "1", "2", "3", "4"]


def test_the_latest_and_the_best_stay(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(3):
            checkpoints.save(step, SMALL, best=step == 0)
        (tmp_path / "notes").mkdir()
        (tmp_path / "7").mkdir()  # not ours
        for step in range(10, 13):
            checkpoints.save(step, SMALL)
    assert checkpoints.steps() == [0, 11, 12]
    assert (checkpoints.best(), checkpoints.latest()) == (0, 12)
    with open_checkpoints(tmp_path, keep=1) as checkpoints:  # another process, later
        assert checkpoints.best() == 0
        checkpoints.save(13, SMALL, best=True)
        assert checkpoints.steps() == [13]
        checkpoints.save(14, SMALL)
    assert checkpoints.steps() == [13, 14]
    assert names(tmp_path) == ["13", "14", "7", "notes"]


def test_nothing_is_there_at_first(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "new")
    assert (checkpoints.latest(), checkpoints.best(), checkpoints.steps()) == (
        None,
        None,
        [],
    )
    checkpoints.close()
    assert not (tmp_path / "new").exists()  # reading makes no directories
    with pytest.raises(ValueError, match="restore: expected a checkpoint in .*new"):
        checkpoints.restore(SMALL)


def test_steps_only_grow(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(3, SMALL, {"first": True})
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"a step above 3, got {step}"):
            checkpoints.save(step, SMALL)
    with pytest.raises(ValueError, match=r"one of the steps \[3\] in .*, got 4"):
        checkpoints.restore(SMALL, 4)
    assert checkpoints.peek(3) == {"first": True}


def test_what_cannot_be_saved_is_refused_before_anything_is(tmp_path, unchecked):
    checkpoints = open_checkpoints(tmp_path / "run")
    for tree, error, text in [
        ({"a": {"b": 1.0}}, TypeError, "a/b to be an array of numbers, got float"),
        ({"a": np.array(["x"])}, TypeError, "a to be an array"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "joined with dots"),
        ({"a": [np.ones(1)], "a/0": np.ones(1)}, ValueError, "joined with dots"),
        ({"a": None}, ValueError, "a tree with arrays in it"),
    ]:
        with pytest.raises(error, match=text):
            checkpoints.save(0, tree)
    for extra in ({"a": b"bytes"}, {"a": np.ones(1)}, ["no", "dict"]):
        with pytest.raises(TypeError, match="extra to hold JSON values"):
            checkpoints.save(0, SMALL, extra)
    assert checkpoints.steps() == []
    with pytest.raises(ValueError, match="keep to be an integer >= 1"):
        open_checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="a local path, got gs://bucket/run"):
        open_checkpoints("gs://bucket/run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a directory, got the file"):
        open_checkpoints(tmp_path / "file")


def test_paths_relative_home_spaces_and_unicode(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for given in ("relative/run", "~/home run", "./größe ñ"):
        checkpoints = open_checkpoints(given)
        with monkeypatch.context() as moved:
            moved.chdir(tmp_path / "elsewhere")
            checkpoints.save(1, SMALL)
            assert checkpoints.latest() == 1
        save_tree(f"{given}/student", SMALL)
    for expected in ("relative/run", "home run", "größe ñ"):
        assert names(tmp_path / expected) == ["1", "student"]


# Failing


def limit_file_size(size: int):
    """A write beyond it fails in the background, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@pytest.fixture
def no_room():
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield limit_file_size
    limit_file_size(soft)


def until_done(poll):
    for _ in range(1000):
        poll()
        time.sleep(0.01)


BIG = {"w": np.random.default_rng(0).standard_normal(500_000)}


def test_a_failed_save_is_told_once_and_leaves_no_trace(tmp_path, no_room, capfd):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, BIG)
    checkpoints.wait()
    before = fingerprint(checkpoints.restore(BIG)[0])
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    for tell in (
        checkpoints.wait,
        checkpoints.close,
        checkpoints.latest,
        lambda: checkpoints.save(3, SMALL),
        lambda: until_done(checkpoints.poll),
    ):
        no_room(1_000_000)
        checkpoints.save(2, BIG)
        with pytest.raises(
            OSError, match=r"4000000 bytes are needed and \d+ are free"
        ) as e:
            tell()
        assert e.value.filename == str(tmp_path / "2")
        no_room(soft)
        checkpoints.wait()  # told once
        checkpoints.poll()
        assert names(tmp_path) == ["1"]
    assert fingerprint(checkpoints.restore(BIG)[0]) == before
    checkpoints.save(2, BIG)
    assert checkpoints.steps() == [1, 2]
    assert capfd.readouterr().err == ""


def test_a_failed_save_does_not_hide_what_ended_the_block(tmp_path, no_room):
    with pytest.raises(KeyError) as caught, open_checkpoints(tmp_path) as checkpoints:
        no_room(1_000_000)
        checkpoints.save(2, BIG)
        raise KeyError("mine")
    assert "nothing was written" in caught.value.__notes__[0]
    with pytest.raises(OSError), open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, BIG)


def test_a_full_disk_is_seen_before_it_is_filled(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for save in (checkpoints.save, lambda _, tree: save_tree(tmp_path / "out", tree)):
        with pytest.raises(OSError, match="4000000 bytes are needed and 1000") as error:
            save(1, BIG)
        assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == []


# Refusing


def test_another_tree_is_refused_with_both_shapes(tmp_path):
    saved = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}, "key": jax.random.key(0)}
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(0, saved)
    for change, text in [
        ({"a": jnp.ones(4)}, r"a: float32 \(3,\) stored, float32 \(4,\) wanted"),
        (
            {"a": jnp.ones(3, jnp.bfloat16)},
            r"a: float32 \(3,\) stored, bfloat16 \(3,\)",
        ),
        ({"a": jnp.ones(3, int)}, "int32"),
        ({"b": None}, r"b/c: float32 \(2, 2\) stored, nothing wanted"),
        ({"d": jnp.ones(())}, r"d: nothing stored, float32 \(\) wanted"),
        (
            {"key": jax.random.key(0, impl="rbg")},
            r"key: key<fry> \(\) stored, key<rbg>",
        ),
        ({"key": jax.random.key_data(saved["key"])}, r"key<fry> \(\) stored, uint32"),
    ]:
        with pytest.raises(ValueError, match=text) as error:
            checkpoints.restore(saved | change)
        assert "1 differences" in str(error.value)
        assert "Build `like` from" in str(error.value)
    many = saved | {f"x{i:02}": jnp.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match="and 20 more") as error:
        checkpoints.restore(many)
    assert "x09" in str(error.value) and "x10" not in str(error.value)


def test_doubles_are_not_cast_when_x64_is_off(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(0, {"w": np.ones(2)})
    save_tree(tmp_path / "out", {"w": np.ones(2)})
    like = {"w": jax.ShapeDtypeStruct((2,), np.float64)}
    for read in (
        lambda: checkpoints.restore(like),
        lambda: load_tree(tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="Set jax_enable_x64"):
            read()
        with jax.enable_x64(True):
            read()


def test_damage_is_seen(tmp_path):
    tree = {"w": np.random.default_rng(0).standard_normal(1000).astype(np.float32)}
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, tree, best=True)
    checkpoints.wait()
    save_tree(tmp_path / "out", tree)

    def break_one(path, how):
        whole = path.read_bytes()
        path.write_bytes(how(bytearray(whole)))
        yield
        path.write_bytes(whole)

    def flip(data):
        data[len(data) // 2] ^= 4
        return data

    for directory, read in [
        (tmp_path / "1", lambda: checkpoints.restore(tree)),
        (tmp_path / "out", lambda: load_tree(tmp_path / "out")),
    ]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        data = max(files, key=lambda path: path.stat().st_size)
        for path, how in [
            (data, flip),
            (data, lambda data: data[: len(data) // 2]),
            (data, lambda data: bytes(len(data))),
            (directory / "hintjax.json", lambda data: data[: len(data) // 2]),
            (directory / "hintjax.json", lambda data: b""),
        ]:
            broken = break_one(path, how)
            next(broken)
            with pytest.raises(
                ValueError, match="as it was written, got damage: .* Restore an"
            ):
                read()
            next(broken, None)
        read()
    record = tmp_path / "1" / "hintjax.json"
    whole = record.read_text()
    record.write_text(whole.replace('"best": true', '"best": false'))
    with pytest.raises(DamageError, match="its checksum has changed"):
        checkpoints.restore(tree)
    # A record of another tree than the one that is there.
    wrong = json.loads(whole)
    wrong["leaves"][0]["data"][1] = [10, 100]
    del wrong["crc32"]
    wrong["crc32"] = zlib.crc32(json.dumps(wrong).encode())
    record.write_text(json.dumps(wrong))
    with pytest.raises(DamageError, match="as it was written, got damage: w"):
        checkpoints.restore(tree)
    wrong["format"] = 3
    record.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="expected format 2, got format 3"):
        checkpoints.peek()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    path = tmp_path_factory.mktemp("three") / "steps"
    with open_checkpoints(path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, saved_small(step), {"at": step})
    return path


def saved_small(step):
    return {"w": np.random.default_rng(step).standard_normal(64), "n": np.int32(step)}


def spoil(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(data[:-1]),
        "zero": lambda: path.write_bytes(bytes(len(data))),
        "delete": path.unlink,
    }[how]()


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "delete"])
def test_any_damaged_file_is_named_and_an_older_step_is_read(
    how, three_steps, tmp_path, capfd
):
    files = [p for p in (three_steps / "3").rglob("*") if p.is_file()]
    assert len(files) > 5
    seen = 0
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(three_steps, run)
        spoil(run / file.relative_to(three_steps), how)
        checkpoints = open_checkpoints(run)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            tree, extra = checkpoints.restore(SMALL64)
        if extra["at"] == 3:
            assert not told
        else:
            seen += 1
            (warning,) = told  # one, whatever was found
            assert str(run / file.relative_to(three_steps)) in str(warning.message)
            assert "went back to step 2" in str(warning.message)
            assert checkpoints.latest() == 2
        assert_same(tree, saved_small(extra["at"]))
    assert capfd.readouterr() == ("", "")  # Orbax was not asked to read it
    assert seen == len(files)


SMALL64 = {"w": np.zeros(64), "n": np.int32(0)}


@pytest.mark.quick
def test_the_run_goes_over_damaged_steps_again_and_keeps_them_aside(
    three_steps, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for step in (2, 3):
        spoil(run / str(step) / "hintjax.json", "truncate")
    with open_checkpoints(run, keep=1) as checkpoints:
        with pytest.warns(UserWarning, match="went back to step 1") as told:
            tree, extra = checkpoints.restore(lambda extra: saved_small(extra["at"]))
        assert len(told) == 1 and f"{run / '2'}" in str(told[0].message)
        assert extra == {"at": 1} and checkpoints.steps() == [1]
        assert names(run) == ["1", "2", "3"]  # reading changes nothing
        assert_same(tree, saved_small(1))
        # The only one that is whole goes when another is there, and not before.
        checkpoints.save(2, tree)
    assert names(run) == ["2", "2.damaged", "3.damaged"]
    checkpoints.restore(SMALL64)


def test_when_nothing_is_whole_the_error_says_so_once(three_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for step in (1, 2, 3):
        spoil(run / str(step) / "_METADATA", "delete")
    with pytest.raises(DamageError, match="that is whole, got none") as error:
        open_checkpoints(run).restore(SMALL64)
    for step in (1, 2, 3):
        assert f"{run / str(step) / '_METADATA'}" in str(error.value)
    with pytest.raises(DamageError, match="Restore another step"):
        open_checkpoints(run).restore(SMALL64, 3)
    assert names(run) == ["1", "2", "3"]


def test_another_tree_is_no_damage_and_nothing_older_is_tried(three_steps):
    with pytest.raises(ValueError, match="restore: expected the tree in .*3") as error:
        open_checkpoints(three_steps).restore({"w": np.zeros(3)})
    assert not isinstance(error.value, DamageError)


def test_links_and_giants_are_refused_before_they_are_opened(three_steps, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(three_steps, run)
    for step, name in ((1, "_METADATA"), (2, "hintjax.json")):
        path = run / str(step) / name
        path.rename(tmp_path / f"{step}")
        path.symlink_to(tmp_path / f"{step}")
    for name in ("_METADATA", "hintjax.json"):
        whole = (run / "3" / name).read_bytes()
        os.truncate(run / "3" / name, 2**40)  # sparse
        with pytest.raises(DamageError, match=name):
            open_checkpoints(run).restore(SMALL64)
        (run / "3" / name).write_bytes(whole)
    for step in (1, 2):
        with pytest.raises(DamageError, match="no such file|a link"):
            open_checkpoints(run).restore(SMALL64, step)


# Fingerprints


@pytest.mark.quick
def test_a_fingerprint_tells_values_apart_and_nothing_else():
    class Pair(NamedTuple):
        b: jax.Array
        a: jax.Array

    a, b = jnp.arange(8.0), jnp.ones(3, jnp.bfloat16)
    tree = {"b": b, "a": a}
    rows = NamedSharding(data_mesh(), PartitionSpec("data"))
    for same in (
        {"a": a, "b": b},
        Pair(b, a),
        FrozenDict(tree),
        {"a": np.asarray(a), "b": np.asarray(b), "c": None, "d": {}},
        {"a": jax.device_put(a, rows), "b": b},
    ):
        assert fingerprint(same) == fingerprint(tree)
    others = [
        tree,
        {"a": a, "b": b + 1},
        {"a": a, "b": np.asarray(b).view(np.float16)},  # equal bytes
        {"a": a.reshape(2, 4), "b": b},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a, "b": {"c": b}},
        {"a": a},
        {"a": a, "b": b, "key": jax.random.key(0)},
        {"a": a, "b": b, "key": jax.random.key(1)},
        {"a": a, "b": b, "key": jax.random.key_data(jax.random.key(1))},
    ]
    assert len({fingerprint(other) for other in others}) == len(others)


# The export


class Student(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), param_dtype=jnp.bfloat16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


@pytest.mark.quick
def test_the_export_is_what_apply_takes_with_equal_logits(tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(Student().init)(jax.random.key(1), x)
    apply = jax.jit(Student().apply)
    want = apply(variables, x)
    path = tmp_path / "student"
    save_tree(path, variables)
    assert names(tmp_path) == ["student"]
    assert_same(load_tree(path), variables)
    with ocp.StandardCheckpointer() as orbax:
        for loaded in (load_tree(path), orbax.restore(path), v1.load(path)):
            np.testing.assert_array_equal(apply(loaded, x), want)
    # Again, over the first, and from another kind of dict, empty collection included.
    save_tree(path, FrozenDict({"params": variables["params"], "batch_stats": {}}))
    assert names(tmp_path) == ["student"]
    assert_same(load_tree(path), {"params": variables["params"], "batch_stats": {}})


def test_the_export_overwrites_nothing_of_others(tmp_path, unchecked):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    checkpoints = open_checkpoints(tmp_path / "run")
    checkpoints.save(1, SMALL)
    for path in (foreign, foreign / "thesis.tex", tmp_path / "run", tmp_path / "run/1"):
        checkpoints.wait()
        with pytest.raises(ValueError, match="a new or empty directory or an earlier"):
            save_tree(path, SMALL)
    assert_same(checkpoints.restore(SMALL)[0], SMALL)
    for tree in (
        [np.ones(1)],
        {"a": [np.ones(1)]},
        {1: np.ones(1)},
        {"a": 1.0},
        SMALL["w"],
    ):
        with pytest.raises(TypeError, match="to be a dict with strings as keys"):
            save_tree(tmp_path / "out", tree)
    for leaf in (np.ones((0, 2)), jax.random.key(0)):
        with pytest.raises(ValueError, match="a/b to be a plain array, and not empty"):
            save_tree(tmp_path / "out", SMALL | {"a": {"b": leaf}})
    for path in (foreign, tmp_path / "nowhere", tmp_path / "run/1"):
        with pytest.raises(ValueError, match="a directory that save_tree wrote"):
            load_tree(path)
    assert names(tmp_path) == ["foreign", "run"]
    (tmp_path / "empty").mkdir()
    save_tree(tmp_path / "empty", SMALL)


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, no_room):
    save_tree(tmp_path / "out", SMALL)
    no_room(1_000_000)
    with pytest.raises(OSError, match="save_tree: nothing was written"):
        save_tree(tmp_path / "out", BIG)
    assert names(tmp_path) == ["out"]
    np.testing.assert_array_equal(load_tree(tmp_path / "out")["w"], SMALL["w"])


# Other people's terminals and processes


def test_orbax_is_quiet_and_others_are_not(tmp_path, monkeypatch, caplog, capfd):
    during_saves(monkeypatch, lambda: absl_logging.warning("the user's own"))
    absl = logging.getLogger("absl")
    filters = list(absl.filters)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "absl"):
        with open_checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, SMALL)
        checkpoints.restore(SMALL)
    assert [r.message for r in caplog.records if r.name == "absl"] == ["the user's own"]
    assert capfd.readouterr() == ("", "")
    assert absl.filters == filters


def python(code: str, *args, **kwargs) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        **kwargs,
    )


def test_the_end_of_the_program_waits_for_the_save(tmp_path):
    code = """
import sys, numpy as np
from hintjax.training import open_checkpoints
tree = {"w": np.random.default_rng(0).standard_normal(500_000)}
for directory in sys.argv[1:]:
    open_checkpoints(directory).save(1, tree)
"""
    (tmp_path / "b" / "1" / "other").mkdir(parents=True)  # in the way
    process = python(code, tmp_path / "a", tmp_path / "b", stderr=subprocess.PIPE)
    error = process.communicate(timeout=60)[1]
    assert open_checkpoints(tmp_path / "a").latest() == 1
    assert "FileRefusal: [Errno 39] save: nothing was written" in error
    assert names(tmp_path / "b") == ["1"] and names(tmp_path / "b" / "1") == ["other"]


def saved_at(step: int) -> dict:
    random = np.random.default_rng(step)
    return {"w": random.standard_normal(400_000), "n": {"step": np.int32(step)}}


ENDLESS = """
import os, sys, numpy as np
from hintjax.training import open_checkpoints
sys.stdin.read()
checkpoints = open_checkpoints(sys.argv[1])
step = checkpoints.latest() or 0
while True:
    step += 1
    random = np.random.default_rng(step)
    tree = {"w": random.standard_normal(400_000), "n": {"step": np.int32(step)}}
    checkpoints.save(step, tree, {"step": step})  # returns when the last one is there
    os.write(1, f"{step - 1}\\n".encode())
"""


def test_a_step_appears_whole_in_one_rename(tmp_path, monkeypatch):
    rename, seen = Path.rename, []

    def watched(source, target):
        before = names(tmp_path)
        rename(source, target)
        seen.append((before, names(tmp_path), names(tmp_path / "1")))

    monkeypatch.setattr(Path, "rename", watched)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, SMALL)
    whole = names(tmp_path / "1")
    assert "hintjax.json" in whole
    assert seen == [([".hintjax-tmp"], [".hintjax-tmp", "1"], whole)]


def test_sigkill_at_any_instant_loses_no_committed_step(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    in_flight = 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [python(ENDLESS, tmp_path, **pipes) for _ in range(4)]  # and wait
    for process, moment in zip(started, (0.1, 0.5, 0.9, 1.0), strict=True):
        with process:
            process.stdin.close()
            process.stdout.readline(), process.stdout.readline()
            start = time.perf_counter()
            process.stdout.readline()
            time.sleep(moment * (time.perf_counter() - start))  # of one save
            process.send_signal(signal.SIGKILL)
            told = process.stdout.read().split()
        newest = checkpoints.latest()
        assert newest >= max(map(int, told), default=2)
        in_flight += names(tmp_path)[0] == ".hintjax-tmp"
        tree, extra = checkpoints.restore(saved_at(0))
        assert_same(tree, saved_at(newest))
        assert extra == {"step": newest}
    assert in_flight >= 2  # most of the kills hit a save
    with checkpoints:
        checkpoints.save(newest + 1, SMALL)
    assert names(tmp_path) == sorted([str(newest), str(newest + 1)])


# Earlier versions


@pytest.mark.parametrize("written", ["format2"])
def test_what_earlier_versions_wrote_is_read_for_ever(written):
    root = ROOT / "tests" / "golden" / "checkpoints" / written
    params = {
        "conv": {
            "kernel": jnp.arange(6.0).reshape(2, 3) / 7,
            "bias": jnp.full(3, 1 / 3, jnp.bfloat16),
        }
    }
    tree = {
        "params": params,
        "count": jnp.int32(5),
        "key": jax.random.key(3),
        "empty": jnp.zeros((0, 2)),
    }
    checkpoints = open_checkpoints(root / "run")
    restored, extra = checkpoints.restore(tree)
    assert_same(restored, tree)
    assert (checkpoints.steps(), checkpoints.best(), extra) == (
        [5],
        5,
        {"now": {"at": 5}},
    )
    assert_same(load_tree(root / "student"), {"params": params})
