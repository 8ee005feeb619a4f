"""Goodput: the fraction of a run's time that counts as training, with frequent kills.

`reliability.py` runs these campaigns. SIGKILL ends a real run of the command at fixed
intervals, and `hintjax resume` continues it at once. Every second of each process
belongs to one part:

* start: all imports;
* compilation: tracing, lowering, compiling, and reading the compilation cache;
* preparation: the data, the networks, the check of the recipe, the fresh state;
* restore: reading the newest checkpoint;
* checkpoint: the training thread is blocked by a save, or waits for a save in flight;
* data wait: the device waits for a batch;
* lost: from the step of the newest checkpoint to the kill; this time is repeated;
* evaluation, steps: the rest, which counts.

    goodput = (steps + evaluation) / (all - start - compilation)
"""

import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import hintjax as hj
from hintjax import models
from hintjax.training import Checkpoints, open_checkpoints, sealed

COMMAND = Path(__file__).parent / "reliability_timed.py"
FEEDS = ("on_device", "streamed")
EXCLUDED = ("start", "compilation")
USEFUL = ("steps", "evaluation")
# An instant that several parts cover belongs to the first of them.
PARTS = (
    *("start", "compilation", "lost", "restore", "checkpoint", "data wait"),
    *("evaluation", "steps", "preparation"),
)
PART_OF = {"latest": "checkpoint", "save": "checkpoint", "data": "data wait"}
STUDENT, TEACHER = "hintjax.models:resnet8", "hintjax.models:resnet20"
SETTING = ("--batch-size", "64", "--pad", "2", "--flip")
IMAGES = 2000  # an epoch, after which a save follows, takes about a second


class Span(NamedTuple):
    """A part of a process's time, in seconds."""

    part: str
    start: float
    end: float


class Told(NamedTuple):
    """The events that one process wrote to its log until it was killed."""

    spans: list[Span]
    steps: list[tuple[int, float]]  # step, and the time of its report
    marks: dict[str, float]


def read(log: Path) -> Told:
    """Reads the lines of a log; an incomplete last line is left out."""
    told = Told([], [], {})
    for line in log.read_text().splitlines(keepends=True):
        word, *rest = line.split()
        if not line.endswith("\n"):
            continue
        if word == "span":
            told.spans.append(Span(rest[0], float(rest[1]), float(rest[2])))
        elif word == "step":
            told.steps.append((int(rest[0]), float(rest[1])))
        else:
            told.marks[word] = float(rest[0])
    return told


def divide(spans: Iterable[Span], began: float, ended: float) -> dict[str, float]:
    """Divides a time into the seconds of each part.

    An instant that several spans cover belongs to the first of them in PARTS. An
    instant that no span covers is preparation.

    >>> spans = [Span("steps", 2, 9), Span("checkpoint", 4, 5), Span("lost", 8, 9)]
    >>> {part: s for part, s in divide(spans, 0, 9).items() if s}
    {'lost': 1.0, 'checkpoint': 1.0, 'steps': 5.0, 'preparation': 2.0}
    """
    turns = []
    for part, start, end in [*spans, Span("preparation", began, ended)]:
        start, end = max(start, began), min(end, ended)
        if part in PARTS and start < end:
            turns += [(start, 1, part), (end, -1, part)]
    seconds, covering, last = dict.fromkeys(PARTS, 0.0), Counter(), began
    for when, step, part in sorted(turns):
        owner = next((name for name in PARTS if covering[name]), None)
        if owner is not None:
            seconds[owner] += when - last
        covering[part] += step
        last = when
    return seconds


def parts(told: Told, newest: int, began: float, ended: float) -> dict[str, float]:
    """The seconds of each part in the life of a killed process.

    Args:
        told: the events of the process.
        newest: the step of the newest checkpoint that it left.
        began: the time when it was started.
        ended: the time when it was killed.
    """
    imported = told.marks.get("imported", ended)
    first = told.marks.get("first", ended)
    kept = max((when for step, when in told.steps if step <= newest), default=first)
    spans = [
        *(span._replace(part=PART_OF.get(span.part, span.part)) for span in told.spans),
        Span("start", began, imported),
        Span("steps", first, ended),
        Span("lost", kept, ended),
    ]
    return divide(spans, began, ended)


def share(seconds: Mapping[str, float]) -> float:
    """The goodput, from the seconds of each part."""
    counted = sum(seconds[part] for part in PARTS if part not in EXCLUDED)
    return sum(seconds[part] for part in USEFUL) / counted


def lasted(told: Told, name: str) -> list[float]:
    """The seconds of every span with this name."""
    return [end - start for part, start, end in told.spans if part == name]


def stalls(told: Told) -> list[float]:
    """Seconds that each save blocked the training thread, with the wait before it."""
    found, waited = [], 0.0
    for part, start, end in told.spans:
        if part == "save":
            found.append(waited + end - start)
        if part in ("latest", "save"):
            waited = end - start if part == "latest" else 0.0
    return found


def goodput(folder: Path, feed: str, minutes: float, every: float) -> dict[str, Any]:
    """Measures the goodput of a run that is killed again and again.

    Args:
        folder: the folder for all files.
        feed: one of FEEDS.
        minutes: minutes until the last kill.
        every: seconds from the start of a process to its kill.
    """
    run_dir, teacher = folder / f"killed {feed}", _teacher(folder)
    begin = ["distill", "--method", "fitnet", "--student", STUDENT]
    begin += ["--teacher", str(teacher), "--dataset", str(_noise(folder)), *SETTING]
    begin += ["--epochs", "100000", "--evaluate-every", "10", "--checkpoint-every", "1"]
    begin += ["--run-dir", str(run_dir)]
    lives, starts, reached = [], [], [0]
    blocked, steps, checksums, writing = [], [], [], []
    for life in range(max(2, round(60 * minutes / every))):
        log = folder / f"{feed} {life}.log"
        arguments = begin if life == 0 else ["resume", str(run_dir)]
        began, ended = _lived(log, feed, arguments, every)
        told = read(log)
        newest = open_checkpoints(run_dir / "checkpoints").latest() or 0
        lives.append(parts(told, newest, began, ended))
        reached.append(newest)
        starts.append(told.marks.get("first", ended) - began)
        checksums += lasted(told, "checksums")
        writing += lasted(told, "writing")
        blocked += stalls(told)
        steps += [
            (after - before) / (at - earlier)
            for (earlier, before), (at, after) in itertools.pairwise(told.steps)
        ]
    seconds = {part: sum(life[part] for life in lives) for part in PARTS}
    step = statistics.median(steps)
    later = lives[1:]
    return {
        "kills": len(lives),
        "seconds between kills": every,
        "goodput": share(seconds),
        "goodput, of every process": [round(share(life), 4) for life in lives],
        "seconds": seconds,
        "start-up with a warm cache, median": {
            "to the first step": statistics.median(starts[1:]),
            **{
                part: statistics.median(life[part] for life in later)
                for part in (*EXCLUDED, "preparation", "restore")
            },
        },
        "start-up with a cold cache": starts[0],
        "lost seconds of a kill": measure.summary([life["lost"] for life in lives]),
        "steps that count": reached[-1],
        "steps of the run never went back": reached == sorted(reached),
        "step seconds, median": step,
        "save blocks, share of a step, median": statistics.median(blocked) / step,
        "checksums, share of a save": sum(checksums) / sum(writing),
    }


def _lived(
    log: Path, feed: str, arguments: Sequence[str], seconds: float | None
) -> tuple[float, float]:
    """Runs one process, killed after `seconds` if given; returns its start and end."""
    path = os.pathsep.join([str(COMMAND.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name, None)  # one device, the command's own cache
    command = [sys.executable, str(COMMAND), str(log), feed, *arguments]
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return began, time.perf_counter()
    if seconds is not None or process.returncode != 0:
        raise RuntimeError(f"ended before the kill: {process.returncode} {errors}")
    return began, time.perf_counter()


def _noise(folder: Path) -> Path:
    """A dataset of small random images."""
    path, random = folder / "noise.npz", np.random.default_rng(0)
    image = random.integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    np.savez(path, image=image, label=np.arange(IMAGES) % 10)
    return path


def _teacher(folder: Path) -> Path:
    """A finished run, as the teacher of the others."""
    path = folder / "teacher"
    if not path.exists():
        arguments = ["distill", "--method", "backprop", "--student", TEACHER]
        arguments += ["--dataset", str(_noise(folder)), "--epochs", "1"]
        arguments += [*SETTING, "--run-dir", str(path)]
        _lived(folder / "teacher.log", FEEDS[0], arguments, None)
    return path


def saves(folder: Path, rounds: int, batch_size: int = 32) -> dict[str, Any]:
    """Measures the cost of a save for the training thread, and of checksums for a save.

    The student is WRN-16-2 on CIFAR's shapes, with Adam and a regressor. Every round
    runs one step alone and one step during a save, and compares them.

    Args:
        folder: the folder for the checkpoints.
        rounds: number of rounds.
        batch_size: examples in a step.
    """
    student, teacher = (hj.linen(models.wrn_16_2(classes=10)) for _ in range(2))
    images = jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    batch = {"image": images, "label": jnp.arange(batch_size) % 10}
    terms = hj.objective(
        task=hj.task(optax.softmax_cross_entropy_with_integer_labels),
        hint=hj.fitnets([("group2", "group2")]),
    )
    stage = hj.distillation_stage(student, teacher, terms, optax.adamw(1e-3))
    ours, theirs = (
        jax.jit(network.init)(jax.random.key(seed), images)
        for seed, network in enumerate((student, teacher))
    )
    state = stage.init(jax.random.key(2), ours, theirs, batch)
    seconds = {name: [] for name in ("step", "blocked", "beside", "save", "checksums")}
    threads = {name: set() for name in seconds}

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(call(*arguments))
            seconds[name].append(time.perf_counter() - start)
            threads[name].add(threading.current_thread())
            return result

        return timed

    def step() -> hj.stages.Metrics:
        nonlocal state
        state, metrics = stage.update(state, theirs, batch)
        return metrics

    jax.block_until_ready(step())
    write, sums = Checkpoints._write, sealed._sums
    with (
        open_checkpoints(folder / "saves") as checkpoints,
        mock.patch.object(sealed, "_sums", clocked("checksums", sums)),
        mock.patch.object(Checkpoints, "_write", clocked("save", write)),
    ):
        for at in range(rounds):
            clocked("step", step)()
            clocked("blocked", checkpoints.save)(at, state)
            clocked("beside", step)()
            checkpoints.wait()
    return {
        "rounds": rounds,
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim),
        "step seconds": measure.summary(seconds["step"]),
        "save seconds, on its thread": measure.summary(seconds["save"]),
        "training thread blocked, share of a step": measure.paired(
            seconds, "blocked", ["step"]
        ),
        "a step beside a save, over one alone": measure.paired(
            seconds, "beside", ["step"]
        ),
        "checksums, share of a save": measure.paired(seconds, "checksums", ["save"]),
        "checksums on the training thread": bool(
            threads["checksums"] & threads["step"]
        ),
    }
