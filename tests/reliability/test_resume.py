"""Exact resume: stop at any step, of any method, in either stage: the same bits."""

import dataclasses
import os
import shutil
import signal
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from hintjax.experiments import attachment, recipes
from hintjax.experiments import run as experiment
from hintjax.experiments.config import Config
from hintjax.experiments.setting import prepare
from hintjax.methods import fitnets
from hintjax.models.blocks import GlobalAveragePool
from hintjax.training import fingerprint, on_device, read_metrics

# Before each, FitNets' hint stage; FSP and FitNets have a stage of their own.
METHODS = {
    "kd": recipes.KD,
    "at": recipes.AT,
    "fitnets": recipes.FITNETS,
    "fsp": recipes.FSP,
    "crd": recipes.CRD,
    "review": recipes.REVIEW,
    "ft": recipes.FT,  # its second phase carries what the first has trained
}
EPOCH = 2  # steps
EPOCHS = {"ft": 3}  # of three phases; others have two


class Net(nn.Module):
    """Convolution, BatchNorm and ReLU in three groups, the pooled vector, logits."""

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = Block(2, name="stem")(x, train)
        for number, width in enumerate(self.widths, start=1):
            x = Block(width, min(number, 2), name=f"group{number}")(x, train)
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


class Block(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (1, 1), self.stride, name="conv")(x)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))


def two_stages(recipe):
    if isinstance(recipe, recipes.BeforeTask):
        return recipe
    return recipes.BeforeTask(fitnets, attachment.middle, after=recipe)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Noise, two small networks, and a teacher's variables."""
    tiny = types.ModuleType("tiny_networks")
    tiny.student = lambda classes: Net((2, 2, 3), classes)
    tiny.teacher = lambda classes: Net((3, 3, 4), classes)
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    image = random.integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
    np.savez(path, image=image, label=np.arange(24) % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiny_networks", tiny)
        config = Config(
            dataset=str(path),
            student="tiny_networks:student",
            teacher="tiny_networks:teacher",
            batch_size=7,
            devices=1,
            hint_epochs=1,
            negatives=4,
            pad=1,
            flip=True,
            checkpoint_every=1,
        )
        setting = prepare(config, teach=True)
        assert setting.dataset.train.n // config.batch_size == EPOCH
        yield setting, setting.teacher.init(jax.random.key(1), setting.inputs)


class Killed(Exception):
    pass


def train(world, run_dir, name, at=None, stop=None):
    """A run, as the command makes it; after step `at`, `stop` is called."""
    setting, teacher = world
    setting = setting._replace(
        config=dataclasses.replace(setting.config, epochs=EPOCHS.get(name, 2)),
        programs=setting.programs.setdefault(name, {}),
    )

    def feed(*arguments):
        made = on_device(*arguments)

        def advance(*where):
            result = made.advance(*where)
            if where[-2] + 1 == at:
                stop()
            return result

        return made._replace(advance=advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "on_device", feed)
        recipe = two_stages(METHODS[name])
        return experiment.run(setting, run_dir, recipe, teacher=teacher, resume=True)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def kill():
    raise Killed


def assert_same_run(one, other):
    """Equal in every bit: state, boundaries, results, every line but its time."""
    (fitted, result, lines), (fitted2, result2, lines2) = one, other
    assert fitted.boundaries == fitted2.boundaries
    assert fingerprint(fitted.state) == fingerprint(fitted2.state)
    assert all(times["seconds"] >= 0 and times["spent"] for times in (result, result2))
    assert without_times(result) == without_times(result2)
    assert lines == lines2


def without_times(result):
    return {key: result[key] for key in result if key not in ("seconds", "spent")}


def with_lines(found, run_dir):
    return *found, [{**line, "time": 0} for line in read_metrics(run_dir)]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_stopped_at_every_step_ends_in_the_same_bits(
    name, world, tmp_path
):
    run_dir = tmp_path / "stopped"
    whole = with_lines(train(world, tmp_path / "whole", name), tmp_path / "whole")
    steps = whole[0].steps
    assert whole[0].boundaries == (*range(EPOCH, steps + 1, EPOCH),)
    assert len(whole[0].boundaries) == EPOCHS.get(name, 2)
    for at in range(1, steps + 1):
        with pytest.raises(KeyboardInterrupt, match=f"step {at} is saved"):
            train(world, run_dir, name, at=at, stop=interrupt)
    again = with_lines(train(world, run_dir, name), run_dir)
    assert_same_run(again, whole)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [interrupt, kill])
def test_a_run_that_is_stopped_at_any_one_step_ends_in_the_same_bits(
    name, stop, world, tmp_path
):
    whole = with_lines(train(world, tmp_path / "whole", name), tmp_path / "whole")
    for at in range(1, whole[0].steps + 1):
        run_dir = tmp_path / "stopped"
        with pytest.raises((KeyboardInterrupt, Killed)):
            train(world, run_dir, name, at=at, stop=stop)
        again = with_lines(train(world, run_dir, name), run_dir)
        assert_same_run(again, whole)
        shutil.rmtree(run_dir)
