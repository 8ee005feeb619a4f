"""Every example once, in the same order, with the same pixels, however interrupted."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
EXAMPLES, EPOCHS = 48, 2
FEEDS = ("on_device", "streamed")


@pytest.fixture(scope="module")
def data():
    """The script, imported as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import reliability_data

        yield reliability_data
        for name in ("reliability_data", "reliability_run"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Each feed's run, and what it sees when nobody disturbs it."""
    made = {feed: data.make(feed, EXAMPLES, EPOCHS) for feed in FEEDS}
    folder = tmp_path_factory.mktemp("whole")
    return {feed: (train, train(folder / feed)) for feed, train in made.items()}


class Lost(Exception):
    """A process that ends with what it has saved so far."""


def lose():
    raise Lost


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


STOPS = {lose: Lost, terminate: SystemExit, interrupt: KeyboardInterrupt}


def stopped_after(step, stop, starts):
    """A feed that calls `stop` when a step is done, and notes where it began."""

    def watch(made):
        def advance(*where):
            result = made.advance(*where)
            at, count = where[-2:]
            starts.append(at)
            if at < step <= at + count:
                stop()
            return result

        return made._replace(advance=advance)

    return watch


def steps_of(data):
    return EXAMPLES // data.BATCH


def interrupted(data, train, run_dir, seed):
    """Five interruptions of the first epoch, and one of the second."""
    chance, first = random.Random(seed), steps_of(data)
    at = [*sorted(chance.sample(range(1, first), 5)), first + chance.randrange(1, 3)]
    ways = chance.sample([*STOPS, *STOPS], 6)
    begun = []
    for step, stop in zip(at, ways, strict=True):
        begun.append([])
        with pytest.raises(STOPS[stop]):
            train(run_dir, stopped_after(step, stop, begun[-1]))
    # It went on where the last one ended or had saved, never from the start.
    kept = 0
    for step, stop, after in zip(at, ways, begun[1:], strict=False):
        saved = (step - 1) // data.EVERY * data.EVERY
        kept = max(kept, saved) if stop is lose else step
        assert after[0] == kept
    return train(run_dir)


def in_order(seen):
    return seen["index"].ravel().tolist()


@pytest.mark.parametrize("feed", FEEDS)
def test_an_undisturbed_epoch_has_every_example_once(feed, data, runs):
    _, seen = runs[feed]
    once = data.compare(seen, seen, EXAMPLES)
    assert once["epochs in which an example was not seen exactly once"] == 0
    first, second = np.split(seen["index"].ravel(), EPOCHS)
    assert first.tolist() != second.tolist()
    # Augmented: no example has the pixels that it had an epoch before.
    pixels = seen["pixels"].reshape(EPOCHS, EXAMPLES, -1)
    moved = pixels[0, first.argsort()] != pixels[1, second.argsort()]
    assert moved.any(-1).mean() > 0.5


@pytest.mark.bits
def test_both_feeds_show_the_same_batches(data, runs):
    (_, ours), (_, theirs) = runs.values()
    found = data.compare(ours, theirs, EXAMPLES)
    assert found["same order"] and found["same pixels, byte for byte"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("feed", FEEDS)
def test_an_interrupted_epoch_has_the_same_examples(feed, seed, data, runs, tmp_path):
    train, whole = runs[feed]
    seen = interrupted(data, train, tmp_path / "run", seed)
    assert in_order(seen) == in_order(whole)
    assert data.compare(seen, whole, EXAMPLES) == {
        "epochs in which an example was not seen exactly once": 0,
        "same order": True,
        "same pixels, byte for byte": True,
    }


@pytest.mark.parametrize("feed", FEEDS)
def test_two_steps_in_one_dispatch_see_the_same(feed, data, runs, tmp_path):
    train, whole = runs[feed]
    together = {"dispatch": data.EVERY, "report_every": data.EVERY}
    for step in (3, 7, 11):
        with pytest.raises(SystemExit):
            train(tmp_path, stopped_after(step, terminate, []), **together)
    found = data.compare(train(tmp_path, **together), whole, EXAMPLES)
    assert found["same order"] and found["same pixels, byte for byte"]


@pytest.mark.parametrize("feed", FEEDS)
def test_a_feed_that_forgets_where_it_was_is_seen(feed, data, runs, tmp_path):
    train, whole = runs[feed]
    with pytest.raises(SystemExit):
        train(tmp_path / "run", stopped_after(5, terminate, []))

    def forgetful(made):
        def advance(program, state, teacher, at, count):
            return made.advance(program, state, teacher, at - 5, count)

        return made._replace(advance=advance)

    found = data.compare(train(tmp_path / "run", forgetful), whole, EXAMPLES)
    assert found["epochs in which an example was not seen exactly once"] > 0
    assert not found["same order"] and not found["same pixels, byte for byte"]
    shutil.rmtree(tmp_path / "run")


def test_pixels_alone_are_seen(data, runs):
    """The same examples with other crops are another run."""
    _, whole = runs["streamed"]
    other = {**whole, "pixels": whole["pixels"][:, :, ::-1]}
    found = data.compare(other, whole, EXAMPLES)
    assert found["same order"] and not found["same pixels, byte for byte"]
