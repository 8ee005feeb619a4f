"""What a run survives: kills, stops, damaged checkpoints and a full disk.

    python benchmarks/reliability.py --out benchmarks/results/reliability.json

Device: CPU. Minutes: 60 on a machine without other work. `--only` runs some of the
campaigns and keeps the others' results in the file. Expected: the figures of the page
next to the JSON file, `reliability.md`, which says what is promised.

Every campaign starts real processes (`reliability_run.py`: both stages, Adam,
BatchNorm, a save every two steps) or damages real checkpoints. It compares every
restored state and the final state, bit for bit, with those of a run that is not
disturbed.

* SIGKILL: the run is killed at many instants, half of them during a save and some of
  them while the process starts.
* SIGTERM and SIGINT: the run is stopped at such instants; the campaign records the exit
  code, the seconds, and whether the current step was saved.
* Damage: bits are flipped, and files cut, zeroed or deleted, in the newest checkpoint.
  Either the damage is seen and the older checkpoint is read, or the damage is harmless
  and all values are equal, or wrong values are read.
* Full disk: the file system has room for some checkpoints, but not for one more.
* Second run: another run starts in the same directory.
* Data: SIGKILLs within one epoch of `reliability_data.py`, which records the examples
  of every step: each example once, in the same order, with the same pixels.
* Goodput and the cost of saves: see `reliability_goodput.py`.
"""

import argparse
import functools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import reliability_data
import reliability_goodput
import reliability_page

from hintjax.training import DamageError, open_checkpoints

RUN = Path(__file__).parent / "reliability_run.py"
DATA_RUN = Path(__file__).parent / "reliability_data.py"
EVERY = 2  # steps between two saves
INSTANTS = ("save", "step", "save", "start")  # of kills, in turn


class Life:
    """One process of a run, with the lines that it printed."""

    def __init__(
        self,
        run_dir: Path,
        steps: int | None = None,
        prefix: Sequence[str] = (),
        script: Path = RUN,
        more: Sequence[str] = (),
    ) -> None:
        """Starts the process.

        Args:
            run_dir: its run directory.
            steps: the value of its option `--steps`, if it is given one.
            prefix: a command that runs it.
            script: the program.
            more: its other arguments.
        """
        command = [*prefix, sys.executable, str(script), str(run_dir), *more]
        if steps is not None:
            command += ["--steps", str(steps)]
        path = os.pathsep.join([str(RUN.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        environment.pop("XLA_FLAGS", None)  # one device
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[tuple[float, list[str]]] = []

    def listen(self) -> Iterator[list[str]]:
        """Yields its lines, as words, until it ends."""
        for line in self.process.stdout:
            if line.endswith("\n"):  # a kill can cut a line
                self.said.append((time.perf_counter(), line.split()))
                yield line.split()

    def end(self, number: int | None = None) -> int:
        """Sends a signal if given, waits for the end, and returns the exit code."""
        if number is not None:
            self.process.send_signal(number)
        with self.process:
            for _ in self.listen():
                pass
            self.errors = self.process.stderr.read()
        return self.process.returncode

    def all(self, word: str) -> list[list[str]]:
        """The arguments of all its lines that begin with `word`."""
        return [words[1:] for _, words in self.said if words[0] == word]

    def last(self, word: str) -> int:
        """The last step in its lines that begin with `word`; 0 if there is none."""
        return max((int(words[0]) for words in self.all(word)), default=0)


def undisturbed(folder: Path, steps: int) -> dict[str, Any]:
    """Runs without disturbance: the states of all saves, and times."""
    life = Life(folder / "whole", steps)
    if life.end() != 0:
        raise RuntimeError(life.errors)
    at = [when for when, words in life.said if words[0] == "at"]
    saves = [when for when, words in life.said if words[0] == "saving"]
    commits = [when for when, words in life.said if words[0] == "committed"]
    return {
        "states": dict(life.all("saving")),
        "ended": life.all("ended")[0][0],
        "start_seconds": at[0] - life.began,
        "step_seconds": statistics.median(np.diff(at)),
        "save_seconds": statistics.median(np.subtract(commits, saves[: len(commits)])),
        "blocked_seconds": statistics.median(
            float(words[0]) for words in life.all("blocked")
        ),
    }


def until(
    life: Life, where: str, step: int, whole: dict, chance: random.Random
) -> bool:
    """Waits for an instant; returns False if the process ended before it."""
    if where == "start":
        time.sleep(chance.uniform(0, whole["start_seconds"] / 3))
        return life.process.poll() is None
    word, length = {"save": ("saving", "save_seconds"), "step": ("at", "step_seconds")}[
        where
    ]
    for words in life.listen():
        if words[0] == word and int(words[1]) >= step:
            time.sleep(chance.uniform(0, whole[length]))
            return True
    return False


def kills(
    folder: Path, steps: int, whole: dict, number: int, chance: random.Random
) -> dict[str, Any]:
    """Spreads SIGKILLs over one run, which is started again after each."""
    run_dir, checkpoints = folder / "killed", folder / "killed" / "checkpoints"
    found = {"kills": 0, "in a save": 0, "at the start": 0, "left temporary files": 0}
    failed_restores = lost_committed = wrong_states = 0
    lost_steps, lost_seconds, committed, training = [], [], 0, 0.0
    for kill in range(number):
        where = INSTANTS[kill % len(INSTANTS)]
        target = 1 + (kill + 0.5 * chance.random()) * (steps - 4) / number
        life = Life(run_dir, steps)
        alive = until(life, where, int(target), whole, chance)
        saving = life.last("saving") > life.last("committed")
        if not alive:
            raise RuntimeError(f"ended before the kill: {life.end()} {life.errors}")
        code = life.end(signal.SIGKILL)
        saving = saving and life.last("saving") > life.last("committed")
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{code} {life.errors}")
        found["kills"] += 1
        found["in a save"] += saving
        found["at the start"] += not life.all("ready")
        found["left temporary files"] += (checkpoints / ".hintjax-tmp").exists()
        committed = max(committed, life.last("committed"))
        newest = open_checkpoints(checkpoints).latest() or 0
        lost_committed += newest < committed
        for at, state in life.all("restored"):
            wrong_states += whole["states"][at] != state
        if life.all("ready"):
            begun = [when for when, words in life.said if words[0] == "at"]
            kept = [
                when
                for when, words in life.said
                if words[0] == "at" and int(words[1]) <= newest
            ]
            training += life.said[-1][0] - begun[0]
            lost_seconds.append(life.said[-1][0] - max(kept, default=begun[0]))
            lost_steps.append(max(life.last("at") - newest, 0))
    life = Life(run_dir, steps)
    failed_restores += life.end() != 0
    same = [[whole["ended"]]] == life.all("ended")
    return found | {
        "failed restores": failed_restores,
        "committed steps lost": lost_committed,
        "restored states that differ": wrong_states,
        "final state equal bit for bit": same,
        "most steps done again": max(lost_steps, default=0),
        "seconds done again, median": statistics.median(lost_seconds or [0.0]),
    }


def stops(
    folder: Path, steps: int, whole: dict, number: int, chance: random.Random
) -> dict[str, Any]:
    """Spreads SIGTERM and SIGINT, in turn, over one run."""
    run_dir, seconds, codes, unsaved, wrong = folder / "stopped", [], {}, 0, 0
    for stop in range(number):
        signal_number = (signal.SIGTERM, signal.SIGINT)[stop % 2]
        where = ("step", "save")[stop // 2 % 2]
        target = 1 + (stop + 0.5 * chance.random()) * (steps - 8) / number
        life = Life(run_dir, steps)
        if not until(life, where, int(target), whole, chance):
            raise RuntimeError(f"ended before the signal: {life.end()} {life.errors}")
        sent = time.perf_counter()
        code = life.end(signal_number)
        seconds.append(time.perf_counter() - sent)
        name = f"{signal.Signals(signal_number).name} exits with"
        codes.setdefault(name, set()).add(code)
        newest = open_checkpoints(run_dir / "checkpoints").latest()
        unsaved += newest < life.last("at")
        for at, state in life.all("restored"):
            wrong += whole["states"].get(at, state) != state
    life = Life(run_dir, steps)
    life.end()
    return {
        "signals": number,
        **{name: sorted(found) for name, found in codes.items()},
        "seconds to the exit, most": max(seconds),
        "stops with a step unsaved": unsaved,
        "restored states that differ": wrong,
        "final state equal bit for bit": [[whole["ended"]]] == life.all("ended"),
    }


def damage(folder: Path, flips: int, chance: random.Random) -> dict[str, Any]:
    """Damages the newest of two checkpoints in one place at a time."""
    path, trees = folder / "damaged", [_tree(step) for step in (1, 2)]
    with open_checkpoints(path) as checkpoints:
        for step, tree in enumerate(trees, start=1):
            checkpoints.save(step, tree, {"step": step})
    files = sorted(file for file in (path / "2").rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]

    def flip(data: bytearray) -> bytearray:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return data

    ways = {
        "a bit flipped, anywhere": [
            (file, flip) for file in chance.choices(files, sizes, k=flips)
        ],
        "a bit flipped, each file": [(file, flip) for file in files * 5],
        "cut": [
            (file, lambda data: data[: chance.randrange(len(data))]) for file in files
        ],
        "zeroed": [(file, lambda data: bytes(len(data))) for file in files],
        "deleted": [(file, None) for file in files],
    }
    return {way: _outcomes(path, trees, places) for way, places in ways.items()}


def _tree(step: int) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    layers = {f"layer{i}": generator.standard_normal((32, 32)) for i in range(8)}
    return {"params": layers, "step": np.int32(step)}


def _outcomes(
    path: Path,
    trees: Sequence[dict[str, Any]],
    places: Sequence[tuple[Path, Callable[[bytearray], bytes | bytearray] | None]],
) -> dict[str, int]:
    found = {"tried": 0, "seen, older one read": 0, "harmless": 0, "wrong values": 0}
    for file, how in places:
        whole = file.read_bytes()
        if how is None:
            file.unlink()
        else:
            file.write_bytes(how(bytearray(whole)))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                tree, extra = open_checkpoints(path).restore(trees[0])
            except DamageError:
                tree, extra = None, {}
        file.write_bytes(whole)
        found["tried"] += 1
        right = tree is not None and all(
            np.array_equal(a, b)
            for a, b in zip(
                [*tree["params"].values()],
                [*trees[extra["step"] - 1]["params"].values()],
                strict=True,
            )
        )
        if not right:
            found["wrong values"] += 1
        elif extra["step"] == 1 and len(told) == 1:
            found["seen, older one read"] += 1
        else:
            found["harmless"] += 1
    return found


def full_disk(folder: Path, steps: int) -> dict[str, Any]:
    """Runs on a file system of 3 MiB, which is soon full."""
    place = folder / "small disk"
    place.mkdir()
    inside = (
        'mount -t tmpfs -o size=3M tmpfs "$0" && dd if=/dev/zero of="$0/else" bs=64K '
        'count=16 2> /dev/null && "$@"; code=$?; cd "$0"; '
        "echo left $(ls run/checkpoints -A); "
        "rm else; exit $code"
    )
    prefix = ["unshare", "-rm", "sh", "-c", inside, str(place)]
    try:
        life = Life(place / "run", steps, prefix)
    except FileNotFoundError:
        return {"tried": False}
    code = life.end()
    left = [name for words in life.all("left") for name in words]
    message = life.errors.strip().splitlines()[-1]
    return {
        "tried": code != 1 or "OSError" in message,
        "exit code": code,
        "error": message.replace(str(folder), ""),
        "left": left,
    }


def second_run(folder: Path, steps: int) -> dict[str, Any]:
    """Starts the same command again while the first process trains."""
    first = Life(folder / "owned", steps)
    for words in first.listen():
        if words[0] == "ready":
            break
    second = Life(folder / "owned", steps)
    code, told = second.end(), second.errors.strip().splitlines()[-1]
    first.end(signal.SIGTERM)
    return {
        "exit code": code,
        "names the owner": f"process {first.process.pid} on " in told,
        "steps made": len(second.all("at")),
    }


def data(folder: Path, feed: str, number: int, chance: random.Random) -> dict[str, Any]:
    """Spreads SIGKILLs over one epoch of a run that records its examples."""
    examples, epochs = 400, 2
    steps = examples // reliability_data.BATCH

    def live(name: str) -> Life:
        more = ["--feed", feed, "--examples", str(examples), "--epochs", str(epochs)]
        return Life(folder / f"{name} {feed}", script=DATA_RUN, more=more)

    def seen(name: str) -> dict[str, np.ndarray]:
        life = live(name)
        if life.end() != 0:
            raise RuntimeError(life.errors)
        with np.load(folder / f"{name} {feed}" / "seen.npz") as file:
            return dict(file)

    whole, killed_at, kept = seen("whole"), [], []
    for kill in range(number):
        target = 1 + (kill + 0.5 * chance.random()) * (steps - 8) / number
        life = live("seen")
        for words in life.listen():
            if words[0] == "at" and int(words[1]) >= target:
                break
        time.sleep(chance.uniform(0, 0.02))
        if life.end(signal.SIGKILL) != -signal.SIGKILL:
            raise RuntimeError(f"ended before the kill: {life.errors}")
        killed_at.append(life.last("at"))
        kept.append(life.last("committed"))
    found = reliability_data.compare(seen("seen"), whole, examples)
    return {
        "kills in the first epoch": sum(at < steps for at in killed_at),
        "examples in an epoch": examples,
        "steps done again": sum(np.subtract(killed_at, kept).clip(0).tolist()),
        **found,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the campaigns, prints the tables, and returns the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=CAMPAIGNS, default=CAMPAIGNS, metavar="CAMPAIGN")
    add("--kills", type=int, default=50, help="number of SIGKILLs")
    add("--stops", type=int, default=20, help="number of SIGTERMs and SIGINTs")
    add("--flips", type=int, default=400, help="bits to flip, one at a time")
    add("--steps", type=int, default=400, help="steps of the run that is killed")
    add("--minutes", type=float, default=15, help="minutes of each goodput campaign")
    add("--every", type=float, default=60, help="seconds between kills, for goodput")
    add("--rounds", type=int, default=30, help="rounds to measure the cost of saves")
    add("--seed", type=int, default=0, help="seed of the random instants and places")
    add("--out", type=Path, help="JSON file to write the results to, with a page")
    options = parser.parse_args(arguments)
    record = {}
    if options.out and options.out.exists():
        record = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder, chance = Path(name), random.Random(options.seed)
        for campaign, run in _campaigns(folder, options, chance).items():
            record[campaign] = {"machine": measure.machine()} | run()
            print(reliability_page.rows(campaign, record[campaign]), flush=True)
            if options.out:
                measure.write(options.out, record)
                page = reliability_page.page(record)
                options.out.with_suffix(".md").write_text(page)
    return record


CAMPAIGNS = (
    *("undisturbed", "SIGKILL", "SIGTERM and SIGINT", "damage", "full disk"),
    *("second run", "data on_device", "data streamed", "saves"),
    *("goodput on_device", "goodput streamed"),
)


def _campaigns(
    folder: Path, options: argparse.Namespace, chance: random.Random
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The campaigns of `--only`, each as a function without arguments."""
    steps = options.steps

    @functools.cache
    def known() -> dict[str, Any]:
        """The result of the undisturbed run, which runs once."""
        return undisturbed(folder, steps)

    def told() -> dict[str, Any]:
        return {name: known()[name] for name in known().keys() - {"states", "ended"}}

    asked = (options.minutes, options.every)
    calls = (
        told,
        lambda: kills(folder, steps, known(), options.kills, chance),
        lambda: stops(folder, steps, known(), options.stops, chance),
        lambda: damage(folder, options.flips, chance),
        lambda: full_disk(folder, steps),
        lambda: second_run(folder, steps),
        lambda: data(folder, "on_device", 5, chance),
        lambda: data(folder, "streamed", 5, chance),
        lambda: reliability_goodput.saves(folder, options.rounds),
        lambda: reliability_goodput.goodput(folder, "on_device", *asked),
        lambda: reliability_goodput.goodput(folder, "streamed", *asked),
    )
    every = dict(zip(CAMPAIGNS, calls, strict=True))
    return {name: every[name] for name in CAMPAIGNS if name in options.only}


if __name__ == "__main__":
    main()
