"""A small run in two stages that prints its events; `reliability.py` kills it.

    python benchmarks/reliability_run.py RUN_DIR --steps 400

It prints one line for each event: `ready` (the first step is done), `at STEP`, `saving
STEP FINGERPRINT`, `blocked SECONDS` (by that save), `committed STEP`, `restored STEP
FINGERPRINT`, `ended FINGERPRINT`.
"""

import argparse
import os
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hintjax as hj
from hintjax.data import Augment, Dataset, Split, evaluation_batches, statistics
from hintjax.training import (
    Checkpoints,
    Phase,
    checkpoints,
    fingerprint,
    fit,
    on_device,
    program,
)

BATCH, EPOCH = 8, 2  # examples in a step, steps in an epoch and between two saves


class Net(nn.Module):
    """Dense layers with BatchNorm, then logits."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The logits."""
        for layer in range(3):
            x = nn.Dense(self.width, name=f"dense{layer}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"norm{layer}")(x)
            x = nn.relu(x)
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


def tell(*words: object) -> None:
    """Prints a line at once, in one write, so that lines of two threads never mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def speak() -> None:
    """Makes saves and restores print a line."""
    save, restore, commit = Checkpoints.save, Checkpoints.restore, checkpoints.commit

    def telling_save(self, step, tree, *rest, **more):
        tell("saving", int(step), fingerprint(tree))
        start = time.perf_counter()
        save(self, step, tree, *rest, **more)
        tell("blocked", time.perf_counter() - start)

    def telling_restore(self, *rest, **more):
        tree, extra = restore(self, *rest, **more)
        tell("restored", extra["now"]["at"], fingerprint(tree))
        return tree, extra

    def telling_commit(caller, staging, target, *rest):
        commit(caller, staging, target, *rest)
        tell("committed", target.name)

    Checkpoints.save, Checkpoints.restore = telling_save, telling_restore
    checkpoints.commit = telling_commit


def noise(seed: int, n: int) -> Split:
    """Random images and labels."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    return Split(image, random.integers(0, 3, n, dtype=np.int32))


def train(run_dir: Path, steps: int, width: int) -> None:
    """Starts or continues the run; half of its steps are in a hint stage."""
    split = noise(0, BATCH * EPOCH)
    others = (noise(1, 10), noise(2, 10))
    dataset = Dataset("noise", 3, split, *others, statistics(split), ("a", "b", "c"))
    student, teacher = hj.linen(Net(width)), hj.linen(Net(width + 8))
    image = jnp.zeros((1, 4, 4, 1))
    hint = hj.fitnets([("dense1", "dense1")])
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    optimizer = optax.adamw(1e-3)
    stages = {
        "hint": hj.hint_stage(student, teacher, hj.objective(hint=hint), optimizer),
        "distillation": hj.distillation_stage(
            student, teacher, hj.objective(task=task, hint=hint), optimizer
        ),
    }
    variables = teacher.init(jax.random.key(2), image)
    phases = [
        Phase(
            name,
            program(stage, BATCH, Augment(pad=1, flip=True)),
            steps // 2,
            variables,
            carry=name == "distillation",
        )
        for name, stage in stages.items()
    ]
    batches = list(evaluation_batches(dataset.validation, 10, dataset.standardize))
    ready = []

    def show(at, metrics, phase):
        if not ready:
            ready.append(tell("ready"))
        tell("at", at)

    fitted = fit(
        run_dir,
        phases,
        on_device(dataset, BATCH, jax.random.key(3)),
        jax.jit(student.init)(jax.random.key(1), image),
        key=jax.random.key(4),
        validation=lambda: batches,
        evaluate_every=10,
        report_every=1,
        resume=True,
        show=show,
    )
    tell("ended", fingerprint(fitted.state))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints its events."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args(arguments)
    cache = str(options.run_dir.parent / "compilation")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.simplefilter("error")
    # A shell starts background processes with SIGINT ignored; this undoes it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    speak()
    train(options.run_dir, options.steps, options.width)


if __name__ == "__main__":
    main()
