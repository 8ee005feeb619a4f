"""One run in several processes, each with two devices."""

import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import processes, sharding
from hintjax.cli import main
from hintjax.experiments.launch import process as launch
from hintjax.training import load_tree, open_checkpoints, read_metrics

PATIENCE = 300  # seconds, on a machine that is very busy


def spawn(words, port, **how):
    """Starts a process with two devices; the last argument is the coordinator."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, words), f"localhost:{port}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **how,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def ended(both):
    """The outputs and the exit codes of two processes."""
    try:
        said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return said, [process.returncode for process in both]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"coordinator": "host:1"}, "no processes and no process"),
        ({"processes": 2, "process": 0}, "no coordinator"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "'host'"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "process in 0..1"),
        ({"coordinator": "host:1", "processes": 0, "process": 0}, "an integer >= 1"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(given, sentence):
    with pytest.raises(ValueError, match=f"processes: expected .*{sentence}"):
        launch.start(**given)


@pytest.mark.quick
@pytest.mark.parametrize("number", ["-1", "2", "7"])
def test_the_command_refuses_a_number_that_no_process_has(number, capsys):
    words = ["--coordinator", "localhost:1", "--processes=2", "--process", number]
    with pytest.raises(SystemExit) as ending:
        main(["distill", *words])
    assert ending.value.code == 2
    wanted = f"hintjax: processes: expected process in 0..1, got {number}"
    assert wanted in capsys.readouterr().err


@pytest.mark.quick
def test_one_process_asks_nobody():
    assert processes.first()
    assert processes.told(lambda: {"a": 1}) == {"a": 1}
    assert processes.largest(3) == 3
    assert processes.each(lambda: 4) == 4
    processes.agree("settings", {"a": object()})  # is not read


class Ended(Exception):
    pass


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "code"), [(SystemExit(143), 143), (RuntimeError("a defect"), 1)]
)
def test_after_an_error_nobody_is_waited_for_long(error, code, monkeypatch, capsys):
    """An error ends the process, because other processes may wait for it forever."""
    never, codes = threading.Event(), []

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.distributed.shutdown", never.wait)
    monkeypatch.setattr("hintjax.experiments.launch.process._LEAVING", 0.01)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Ended), launch.leaving():
        raise error
    assert codes == [code]
    assert ("RuntimeError: a defect" in capsys.readouterr().err) == (code == 1)
    never.set()  # all have left
    monkeypatch.setattr("jax.distributed.shutdown", never.is_set)
    with pytest.raises(type(error)), launch.leaving():
        raise error
    assert codes == [code]


@pytest.mark.quick
def test_a_start_meets_connects_and_compares_devices(monkeypatch):
    seen = []

    def initialize(*args, **how):
        seen.append((args, signal.getsignal(signal.SIGINT)))
        assert how["heartbeat_timeout_seconds"] < 60

    devices = [types.SimpleNamespace(process_index=i) for i in (0, 1, 1)]
    monkeypatch.setattr(launch, "meet", lambda *args: seen.append(args))
    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr("jax.devices", lambda: devices)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match=r"as many devices in each .*0: 1, 1: 2"):
        launch.start("host:1", 2, 1)
    # The wait inside JAX is not in Python.
    assert seen == [("host:1", 2, 1), (("host:1", 2, 1), signal.SIG_DFL)]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.quick
def test_a_connection_without_an_end_is_given_up(monkeypatch, capsys):
    codes, left = [], threading.Event()

    def leave(code):
        codes.append(code)
        left.set()

    monkeypatch.setattr(launch, "meet", lambda *args: None)
    monkeypatch.setattr(launch, "_CONNECTING", 0.05)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **__: left.wait(60))
    launch.start("host:1", 2, 1)
    assert codes == [2]
    wanted = "hintjax: processes: expected all 2 at host:1 to connect, got no answer"
    assert wanted in capsys.readouterr().err


def test_a_process_that_is_killed_while_it_waits_ends_the_others(tmp_path):
    """Of three processes one is never started, and one is killed: the third ends."""
    port = free_port()
    command = ("-m", "hintjax.cli", "distill", "--processes", "3")
    first, second = (
        spawn((*command, f"--process={i}", "--coordinator"), port, cwd=tmp_path)
        for i in range(2)
    )
    said = [first.stdout.readline() for _ in range(1)]
    while "waiting for process 2 at" not in said[-1]:
        said.append(first.stdout.readline())
        assert said[-1], said
    second.kill()
    begun = time.monotonic()
    (rest, _), codes = ended([first, second])
    assert time.monotonic() - begun < 20
    assert codes == [2, -signal.SIGKILL], rest
    wanted = (
        "hintjax: processes: expected process 1 to wait for the others, got its end"
    )
    assert wanted in rest and "Traceback" not in rest


# A user's own loop, on data that Grain reads.
STREAMED = """
import jax, jax.numpy as jnp, numpy as np, optax
import hintjax as hj
from hintjax import data, training as train

def run(folder, mesh):
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (48, 4, 4, 1), dtype=np.uint8)
    split = data.Split(image, np.arange(48, dtype=np.int32) % 3)
    scale = data.statistics(split)
    dataset = data.Dataset("drawn", 3, split, split, split, scale, ("a", "b", "c"))

    def apply(params, state, x, train, key):
        x = x.reshape(x.shape[0], -1)
        return jnp.tanh(x @ params["in"]) @ params["out"], {}, state

    params = {"in": random.normal(size=(16, 8)), "out": random.normal(size=(8, 3))}
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    method = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    layout = hj.Layout(mesh, at_least=1)
    network = hj.function(apply)
    sgd = optax.sgd(0.1)
    stage = hj.distillation_stage(network, None, method, sgd, mesh=layout)
    feed = train.streamed(dataset, 8, jax.random.key(5), mesh)
    program = train.program(stage, 8, data.Augment(pad=1, flip=True), mesh)
    phase = train.Phase("task", program, 15)
    fitted = train.fit(folder, [phase], feed, hj.Variables(params, {}),
                       key=jax.random.key(0), report_every=3)
    return fitted.state.params["student"]
"""

TOGETHER = """
import json, runpy, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from hintjax import data, processes, sharding
from hintjax.experiments.launch import process as launch
from hintjax.training import DamageError, load_tree, open_checkpoints, save_tree

folder, process, coordinator = sys.argv[1], int(sys.argv[2]), sys.argv[3]
launch.start(coordinator, 2, process)
mesh = sharding.make_mesh(fsdp=2)
found = {}

# The result of the first process, even an error of a type that only the caller knows.
def find():
    raise DamageError("a tooth: expected none, got one")

try:
    processes.told(find, DamageError)
except DamageError as error:
    found["told"] = str(error)
try:
    processes.agree("settings", {"rate": 0.1, "seed": process})
except ValueError as error:
    found["agree"] = str(error)
processes.agree("settings", {"rate": 0.1})
found["largest"] = processes.largest(process)

# Errors that only one process finds, each at another place.
def look():
    if process == 1:
        raise OSError("no such file")
    return "there"

try:
    found["each"] = processes.each(look)
except (OSError, ValueError) as error:
    found["each"] = f"{type(error).__name__}: {error}"
assert processes.each(lambda: process) == process

# Values are compared bit for bit, with the sign of zero and nan.
odd = np.array([-0.0, np.nan, np.inf, 1e-45], np.float32)
(got,) = processes.told_arrays([odd] if process == 0 else None, [((4,), np.float32)])
found["odd"] = got.tobytes() == odd.tobytes()

# Each process reads its own part of the batches.
image = np.arange(24 * 3, dtype=np.uint8).reshape(24, 3, 1, 1)
split = data.Split(image, np.arange(24, dtype=np.int32) % 4)
batches = data.stream(split, 4, data.statistics(split), process_index=process,
                      process_count=2)
mine, whole = [], []
for _ in range(3):
    batch = next(batches)
    mine += batch["index"].tolist()
    batch = sharding.from_process(batch, mesh)
    assert batch["image"].shape == (8, 3, 1, 1)
    whole.append(processes.gather(batch["index"]).tolist())
found |= {"mine": mine, "whole": whole}

try:
    sharding.check_spans({"image": np.zeros((8, 4, 4, 1))}, mesh)
except ValueError as error:
    found["spans"] = str(error)

# A sharded state; no process has all shards.
rows = NamedSharding(mesh, PartitionSpec("fsdp"))
apart = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
tree = {
    "rows": jnp.arange(8.0), "apart": -jnp.arange(8.0), "key": jax.random.key(3),
}
where = {"rows": rows, "apart": apart, "key": sharding.replicated(mesh)}
state = sharding.spread(tree, where)
here = folder if process == 0 else folder + "/nowhere"  # only the first has the disk
with open_checkpoints(here + "/checkpoints") as checkpoints:
    checkpoints.save(1, state, {"at": 1})
    checkpoints.wait()
    found["steps"] = checkpoints.steps()
    back, extra = checkpoints.restore(state)
    found["extra"] = extra
    for name in ("rows", "apart"):
        assert back[name].sharding == state[name].sharding
        assert (processes.gather(back[name]) == tree[name]).all()
    assert (jax.random.key_data(back["key"]) == jax.random.key_data(tree["key"])).all()
    try:
        checkpoints.restore({"rows": state["rows"]})
    except ValueError as error:
        found["other"] = "2 differences" in str(error)
save_tree(here + "/student", {"params": {"w": state["rows"]}, "empty": {}})
student = load_tree(here + "/student")
found["student"] = [student["params"]["w"].tolist(), student["empty"]]
run = runpy.run_path(folder + "/streamed.py")["run"]
for name, wrong in {
    "odd": lambda: sharding.from_process({"image": np.zeros((7, 4, 4, 1))}, mesh),
    "sizes": lambda: sharding.from_process({"image": np.zeros(2 + 2 * process)}, mesh),
    "own": lambda: run(here + "/own", sharding.make_mesh(devices=jax.local_devices())),
    "twice": lambda: launch.start(coordinator, 2, process),
}.items():
    try:
        wrong()
    except ValueError as error:
        found[name] = str(error)
student = run(here + "/run", mesh)
found["shares"] = [str(student[name].sharding.spec) for name in ("in", "out")]
found["streamed"] = {name: processes.gather(w).tolist() for name, w in student.items()}
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("together"), free_port()
    script = folder / "script.py"
    script.write_text(TOGETHER)
    (folder / "streamed.py").write_text(STREAMED)
    both = [spawn((script, folder, process), port) for process in range(2)]
    said, codes = ended(both)
    assert codes == [0, 0], said
    found = [
        json.loads(line.partition("FOUND")[2])
        for text in said
        for line in text.splitlines()
        if "FOUND" in line
    ]
    return folder, found


def test_what_the_first_process_finds_is_found_by_all(together):
    for found in together[1]:
        assert found["told"] == "a tooth: expected none, got one"
        assert found["largest"] == 1
        assert found["odd"]


def test_processes_that_were_told_otherwise_name_what_differs(together):
    first, second = (found["agree"] for found in together[1])
    assert first == second
    assert "another in process 1:\n  seed: 0 in process 0, 1 in 1\n" in first
    assert "rate" not in first


def test_what_one_process_finds_wrong_ends_all(together):
    first, second = (found["each"] for found in together[1])
    assert first.startswith("Refusal: processes: expected process 1 to go on, got ")
    assert "no such file" in first
    assert second == "OSError: no such file"


def test_processes_read_disjoint_parts_of_the_same_batches(together):
    first, second = together[1]
    assert sorted(first["mine"] + second["mine"]) == list(range(24))
    assert first["whole"] == second["whole"]
    assert "'image', which is this process' own" in first["spans"]
    assert "from_process" in first["spans"]
    for i, batch in enumerate(first["whole"]):
        part = slice(4 * i, 4 * i + 4)
        assert batch == first["mine"][part] + second["mine"][part]


def test_processes_that_each_read_a_part_train_one_student(together):
    folder, (first, second) = together
    assert first["streamed"] == second["streamed"]
    assert all("fsdp" in spec for spec in first["shares"])
    run = runpy.run_path(str(folder / "streamed.py"))["run"]
    alone = run(folder / "alone", sharding.make_mesh(devices=jax.devices()[:1]))
    for name, weights in alone.items():
        np.testing.assert_allclose(weights, first["streamed"][name], atol=1e-5)
    steps = [
        [line["step"] for line in read_metrics(folder / r)] for r in ("run", "alone")
    ]
    assert steps[0] == steps[1] == [3, 6, 9, 12, 15]


def test_what_is_made_of_one_process_alone_is_refused(together):
    for found in together[1]:
        assert "the 2 devices of a process can share evenly" in found["odd"]
        assert "Use a multiple of 2, such as 6 or 8" in found["odd"]
        assert "the same shapes of their batches" in found["sizes"]
        assert "image: [2] in process 0, [4] in 1" in found["sizes"]
        assert "fit: expected stages on the devices of all processes" in found["own"]
        assert "processes: expected to start, once and before" in found["twice"]


def test_a_checkpoint_of_two_processes_is_read_by_both_and_by_one(together):
    folder, found = together
    for one in found:
        assert one["steps"] == [1]
        assert one["extra"] == {"at": 1}
        assert one["other"]
        assert one["student"] == [list(range(8)), {}]
    assert not (folder / "nowhere").exists()
    mesh = sharding.make_mesh(fsdp=4)
    homes = {
        "rows": sharding.replicated(mesh),
        "apart": sharding.over_batch(mesh),
        "key": sharding.replicated(mesh),
    }
    like = {"rows": jnp.zeros(8), "apart": jnp.zeros(8), "key": jax.random.key(0)}
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(sharding.spread(like, homes))
    assert state["apart"].sharding == homes["apart"]
    np.testing.assert_array_equal(state["apart"], -np.arange(8.0))
    assert (
        jax.random.key_data(state["key"]) == jax.random.key_data(jax.random.key(3))
    ).all()


OPTIONS = (
    *("--method", "fitnets", "--student", "hintjax.models:plain_wide"),
    *("--batch-size", "16", "--epochs", "40", "--teacher-epochs", "1"),
    *("--evaluate-every", "20", "--checkpoint-every", "20", "--teacher-at-least", "0"),
    *("--optimizer", "sgd", "--learning-rate", "0.01", "--pad", "1", "--fsdp", "2"),
)


def pair(command, run_dir, *rest, cwd):
    """The command in two processes; only the first has the run directory."""
    port = free_port()

    def one(process):
        folder = run_dir if process == 0 else Path("not/here")
        where = ("--run-dir", folder) if command == "distill" else (folder,)
        several = ("--processes", "2", "--process", process, "--coordinator")
        words = ("-m", "hintjax.cli", command, *where, *rest, *several)
        return spawn(words, port, cwd=cwd)

    return [one(process) for process in range(2)]


def wait_for_step(run_dir, step, both):
    """Returns when a run has reported a later step than `step`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and all(process.poll() is None for process in both):
        if any(line["step"] > step for line in read_metrics(run_dir)):
            return
        time.sleep(0.05)
    raise AssertionError(ended(both))


@pytest.mark.long
@pytest.mark.filterwarnings("default:resume. .* goes on with changes")
def test_a_run_moves_from_two_processes_to_one_and_back(
    corners, tmp_path, monkeypatch, capsys
):
    """A run that moves ends with the student of a run that was never stopped.

    A signal to one of two processes stops the run in the hint stage. One process with
    parameters in four shards continues it and is stopped; two processes finish it. The
    students are equal up to rounding.
    """
    run_dir, whole = tmp_path / "moved", tmp_path / "whole"
    options = ("--dataset", corners, *OPTIONS)
    main(["distill", "--run-dir", str(whole), *options])
    teacher = ("--teacher", str(whole / "teacher"))

    both = pair("distill", run_dir, *options, *teacher, cwd=tmp_path)
    wait_for_step(run_dir, 0, both)
    both[1].send_signal(signal.SIGTERM)  # the other process learns of it
    said, codes = ended(both)
    assert codes == [143, 143], said
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        first = checkpoints.latest()
    assert 0 < first < 100, said
    assert not (tmp_path / "not").exists()

    seen = []

    def stop_later(report):
        def begin(name):
            def show(at, metrics, phase):
                seen.append(at)
                if at >= 140:
                    signal.raise_signal(signal.SIGTERM)

            return show

        return begin

    with monkeypatch.context() as patch:
        patch.setattr("hintjax.experiments.distill._counting", stop_later)
        with pytest.raises(SystemExit) as ending:
            main(["resume", str(run_dir), "--devices", "4", "--fsdp", "4"])
    assert ending.value.code == 143
    assert seen[0] >= first  # its report may be what was owed

    said, codes = ended(pair("resume", run_dir, cwd=tmp_path))
    assert codes == [0, 0], said
    results = [
        json.loads((path / "result.json").read_text()) for path in (run_dir, whole)
    ]
    assert results[0]["steps"] == results[1]["steps"] == 200
    moved, unmoved = (load_tree(path / "student") for path in (run_dir, whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3),
        moved,
        unmoved,
    )
    steps = [line["step"] for line in read_metrics(run_dir)]
    assert steps == [line["step"] for line in read_metrics(whole)]

    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)  # fewer than shares
    capsys.readouterr()
    main(["eval", str(run_dir)])
    assert f"{results[0]['test/accuracy']:.4f}" in capsys.readouterr().out


ASLEEP = """
import os, pathlib, time
import jax
from hintjax import models

def net(classes):
    \"\"\"One process is late, so the other is in a wait outside Python.\"\"\"
    if jax.process_index() == int(os.environ["ASLEEP"]):
        pathlib.Path("asleep").touch()
        time.sleep(600)
    return models.plain_wide(classes)
"""


def two(run_dir, options, cwd):
    """The command `distill` in two processes, each with its own options."""
    port = free_port()

    def one(process):
        command = ("-m", "hintjax.cli", "distill", "--run-dir", run_dir)
        several = ("--processes", "2", f"--process={process}", "--coordinator")
        return spawn((*command, *options[process], *several), port, cwd=cwd)

    return [one(process) for process in range(2)]


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--epochs", "0"), "hintjax: config: expected epochs to be an integer >= 1"),
        (("--nonsense", "1"), "ended with the exit code 2"),
    ],
)
def test_a_bad_option_in_one_process_ends_all_at_once(
    wrong, option, sentence, corners, tmp_path
):
    options = [("--method", "kd", "--dataset", corners) for _ in range(2)]
    options[wrong] += option
    begun = time.monotonic()
    said, codes = ended(two(tmp_path / "run", options, tmp_path))
    assert codes == [2, 2], said
    assert sentence in said[1 - wrong]
    if option[0] == "--epochs":  # the sentence is the same in both
        assert sentence in said[wrong]
    assert time.monotonic() - begun < PATIENCE / 3
    assert "Traceback" not in "".join(said) and "heartbeat" not in "".join(said)


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("asleep", [0, 1])
def test_a_signal_to_one_process_before_training_ends_all_at_once(
    stopped, asleep, corners, tmp_path, monkeypatch
):
    """Whether the process is in Python, or in a wait for another process outside it."""
    (tmp_path / "slow.py").write_text(ASLEEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("ASLEEP", str(asleep))
    options = ("--method", "kd", "--dataset", corners, "--student", "slow:net")
    both = two(tmp_path / "run", [options] * 2, tmp_path)
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "asleep").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)  # the other process waits by now
    number = signal.SIGTERM if asleep else signal.SIGINT
    both[stopped].send_signal(number)
    begun = time.monotonic()
    said, codes = ended(both)
    assert codes == [128 + number] * 2, said
    assert time.monotonic() - begun < 20  # JAX takes longer to miss a process
    for text in said:
        assert f"hintjax: process {stopped} was stopped by {number.name}" in text


# The command, with rows of the cache on the device or, if the first word is "disk",
# read from the disk for each batch.
CACHED = """
import sys
from hintjax.cli import main
from hintjax.experiments import caching

if sys.argv.pop(1) == "disk":
    caching.ON_DEVICE, caching.IN_MEMORY = 1, 2
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "home", [pytest.param("device", marks=pytest.mark.long), "disk"]
)
def test_two_processes_write_and_read_one_cache(home, cached_alone, corners, tmp_path):
    """Each writes a part of the shards; the bytes are those of one process."""
    alone, options = cached_alone
    script, run_dir, port = tmp_path / "script.py", tmp_path / "run", free_port()
    script.write_text(CACHED)
    options = (*options, "--teacher", alone / "teacher", "--dataset", corners)

    def one(process):
        where = ("--run-dir", run_dir if process == 0 else tmp_path / "other")
        several = ("--processes", "2", "--process", process, "--coordinator")
        return spawn((script, home, "distill", *where, *options, *several), port)

    said, codes = ended([one(process) for process in range(2)])
    assert codes == [0, 0], said
    assert ("on disk" if home == "disk" else "on the device") in said[0]
    ours, theirs = run_dir / "cache", alone / "cache"
    names = sorted(file.name for file in theirs.glob("rows-*.npy"))
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    lists = [ours / "shards.jsonl", ours / "shards-1.jsonl"]
    wrote = [
        [json.loads(line)[0] for line in file.read_text().splitlines()]
        for file in lists
    ]
    assert wrote == [names[::2], names[1::2]] and len(names) > 8
    assert not (tmp_path / "other").exists()
    students = [load_tree(path / "student") for path in (run_dir, alone)]
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-3)
    jax.tree.map(close, *students)


@pytest.fixture(scope="module")
def cached_alone(corners, tmp_path_factory):
    """A run with a cache in one process, and its options."""
    run_dir = tmp_path_factory.mktemp("cached") / "run"
    options = (
        *("--method", "kd", "--student", "hintjax.models:plain_wide", "--cache"),
        *("--batch-size", "16", "--epochs", "3", "--teacher-epochs", "1"),
        *("--teacher-at-least", "0", "--optimizer", "sgd", "--learning-rate", "0.01"),
        *("--pad", "1", "--views", "2"),
    )
    more = ("--dataset", corners, "--devices", "4", "--run-dir", str(run_dir))
    main(["distill", *options, *more])
    return run_dir, options


@pytest.mark.long
def test_a_comparison_is_the_same_in_two_processes(corners, tmp_path):
    options = (
        *("--compare", "backprop", "kd", "--dataset", corners, "--seeds", "1"),
        *("--student", "hintjax.models:plain_wide", "--batch-size", "16"),
        *("--epochs", "2", "--teacher-epochs", "1", "--teacher-at-least", "0"),
        *("--optimizer", "sgd", "--learning-rate", "0.01"),
    )
    port = free_port()
    both = []
    for process in range(2):
        # Only the first process has the run directory of the comparison.
        where = ("--run-dir", tmp_path / f"of{process}")
        several = ("--processes", "2", "--process", process, "--coordinator")
        words = ("-m", "hintjax.cli", "distill", *where, *options, *several)
        both.append(spawn(words, port))
    said, codes = ended(both)
    assert codes == [0, 0], said
    assert not (tmp_path / "of1").exists()
    assert (tmp_path / "of0" / "comparison.png").stat().st_size > 1000
    alone = tmp_path / "alone"
    main(["distill", *map(str, options), "--devices", "4", "--run-dir", str(alone)])
    ours, theirs = (
        json.loads((run / "report.json").read_text())["rows"]
        for run in (tmp_path / "of0", alone)
    )
    assert [row["arm"] for row in ours] == [row["arm"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one["seeds"], other["seeds"], atol=0.1)
