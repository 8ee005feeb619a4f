"""A run that records the examples of its steps, to test that its data are exact.

    python benchmarks/reliability_data.py RUN_DIR --feed streamed

A term of the objective writes the index and the augmented pixels of every example of a
step into the memory of the stage, which is saved in the checkpoints. So the memory at
the end holds the examples that have trained the final parameters. The run prints one
line for each event, as in `reliability_run.py`: `at STEP`, `committed STEP`, `ended`.
At the end, `RUN_DIR/seen.npz` holds the record.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from reliability_run import noise, speak, tell

import hintjax as hj
from hintjax.data import Augment, Dataset, statistics
from hintjax.training import Feed, Phase, fit, on_device, program, streamed

BATCH, SHAPE = 4, (4, 4, 1)
EVERY = 2  # steps between two saves
AUGMENT = Augment(pad=1, flip=True)
FEEDS = ("on_device", "streamed")


class Net(nn.Module):
    """One dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The logits."""
        return nn.Dense(3, name="classifier")(x.reshape(len(x), -1))


def witness(steps: int) -> hj.Method:
    """A method without a loss that records the examples of every step in order.

    Args:
        steps: number of steps of the whole run.
    """

    def init(key, student, teacher, data):
        index = jnp.full((steps, BATCH), -1, jnp.int32)
        pixels = jnp.zeros((steps, BATCH, *SHAPE), jnp.float32)
        return {}, {"index": index, "pixels": pixels}

    def apply(params, memory, student, teacher, batch, context):
        if context.train:
            memory = {
                "index": memory["index"].at[context.step].set(batch["index"]),
                "pixels": memory["pixels"].at[context.step].set(batch["image"]),
            }
        return jnp.zeros(BATCH), memory, {}

    return hj.Method(hj.Wants(), hj.Wants(), init, apply)


def make(feed: str, examples: int, epochs: int) -> Callable[..., dict[str, Any]]:
    """Makes a run of one stage, which is compiled once: `train(run_dir, watch=, ...)`.

    Args:
        feed: one of FEEDS.
        examples: number of examples, a multiple of BATCH.
        epochs: number of epochs of the run.

    Returns:
        A function that starts or continues the run and returns the recorded examples.
        `watch` can replace its feed; other arguments go to `fit`.
    """
    split, image = noise(0, examples), jnp.zeros((1, *SHAPE))
    dataset = Dataset("noise", 3, *[split] * 3, statistics(split), ("a", "b", "c"))
    student, steps = hj.linen(Net()), epochs * examples // BATCH
    task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
    terms = hj.objective(task=task, seen=hj.weighted(witness(steps), 0.0))
    stage = hj.distillation_stage(student, None, terms, optax.sgd(0.01))
    phase = Phase("distillation", program(stage, BATCH, AUGMENT), steps)
    variables = jax.jit(student.init)(jax.random.key(1), image)

    def fed() -> Feed:
        from_source = {"on_device": on_device, "streamed": streamed}[feed]
        made = from_source(dataset, BATCH, jax.random.key(3))
        # The loop only uses the length of an epoch to decide when to save.
        return made._replace(per_epoch=EVERY)

    def train(
        run_dir: Path,
        watch: Callable[[Feed], Feed] = lambda made: made,
        **more: Any,
    ) -> dict[str, Any]:
        how = {"key": jax.random.key(4), "report_every": 1, "resume": True, **more}
        fitted = fit(run_dir, [phase], watch(fed()), variables, **how)
        return jax.device_get(fitted.state.memory["seen"])

    return train


def compare(seen: dict[str, Any], whole: dict[str, Any], examples: int) -> dict:
    """Compares the record of a run with that of a run that was not disturbed.

    Args:
        seen: the record of the run.
        whole: the record of the undisturbed run.
        examples: number of examples in an epoch.
    """
    epochs = seen["index"].reshape(-1, examples)
    counts = [np.bincount(epoch[epoch >= 0], minlength=examples) for epoch in epochs]
    return {
        "epochs in which an example was not seen exactly once": sum(
            bool((count != 1).any()) for count in counts
        ),
        "same order": bool((seen["index"] == whole["index"]).all()),
        "same pixels, byte for byte": seen["pixels"].tobytes()
        == whole["pixels"].tobytes(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints its events, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--feed", choices=FEEDS, default=FEEDS[0])
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(arguments)
    cache = str(options.run_dir.parent / "compilation")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.simplefilter("error")
    speak()
    train = make(options.feed, options.examples, options.epochs)
    seen = train(options.run_dir, show=lambda at, metrics, phase: tell("at", at))
    np.savez(options.run_dir / "seen.npz", **seen)
    tell("ended")


if __name__ == "__main__":
    main()
