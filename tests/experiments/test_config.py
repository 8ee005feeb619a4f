"""Configs: in and out of YAML, and what they refuse."""

import dataclasses
import itertools

import pytest
import yaml

from hintjax.experiments import config as configs
from hintjax.experiments.config import Config

pytestmark = pytest.mark.quick


def test_a_config_survives_its_own_yaml(tmp_path):
    config = Config(
        method="kd",
        epochs=7,
        pairs=("a/b=c",),
        rates=(1e-3, 0.5),
        patience=3,
        flip=True,
    )
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config
    assert configs.load(tmp_path / "config.yaml") == config
    assert configs.load(tmp_path).rates == (1e-3, 0.5)


def test_every_field_can_be_read_back_from_its_default(tmp_path):
    configs.save(Config(), tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(written) == {field.name for field in dataclasses.fields(Config)}
    assert configs.load(tmp_path) == Config()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"epoch": 3}, "config: expected a known key, got 'epoch'. Nearest: epochs"),
        ({"temprature": 3}, "Nearest: temperature"),
        ({"epochs": "3"}, "expected epochs to be int, got '3'"),
        ({"epochs": True}, "expected epochs to be int, got True"),
        ({"epochs": 0}, "expected epochs to be an integer >= 1, got 0"),
        ({"flip": 1}, "expected flip to be bool, got 1"),
        ({"optimizer": "adamw"}, "expected optimizer to be adam or sgd, got 'adamw'"),
        ({"pairs": "a=b"}, "expected pairs to be"),
        ({"pairs": ["ab"]}, "expected pairs as guided=hint, got 'ab'"),
        ({"layer_rates": ["a"]}, "expected layer_rates as layer=factor, with a factor"),
        ({"layer_rates": ["a=b"]}, "layer=factor, with a factor >= 0, got 'a=b'"),
        ({"layer_rates": ["a=-1"]}, "layer=factor, with a factor >= 0, got 'a=-1'"),
        ({"rates": ["fast"]}, "expected rates to be float, got 'fast'"),
        ({"rates": [0.0]}, "expected learning_rate to be > 0, got 0"),
        ({"temperature": 0.0}, "expected temperature to be > 0, got 0"),
        ({"temperature": -1}, "expected temperature to be > 0, got -1"),
        ({"learning_rate": float("nan")}, "expected learning_rate to be > 0"),
        ({"weight": -1.0}, "expected weight to be >= 0, got -1"),
        ({"settings": ["at.weight=1"]}, "expected settings of the methods in compare"),
        ({"compare": ["at"], "settings": ["at.weight=-1"]}, "weight to be >= 0, got"),
        ({"compare": ["at"], "settings": ["at.wait=1"]}, "got 'wait'. Nearest: weig"),
        ({"compare": ["at"], "settings": ["at.weight"]}, "as method.option=value"),
        ({"compare": ["at"], "settings": ["at.weight=a"]}, "weight to be float, got"),
        ({"task_weight": float("inf")}, "expected task_weight to be >= 0"),
        ({"weight": 0, "task_weight": 0}, "expected a loss with a weight > 0"),
        ({"hint_epochs": 9}, "expected hint_epochs between 1 and epochs - 1 = 8"),
        ({"accumulate": 0}, "expected accumulate to be an integer >= 1, got 0"),
        ({"spike_factor": 1.0}, "expected spike_factor to be > 1, got 1.0"),
        ({"limit": 0}, "expected limit to be an integer >= 1, got 0"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(ValueError) as error:
        configs.from_dict(fields)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("!!python/object/apply:os.system [echo]", ValueError),
        ("a: [1", ValueError),
        ("- 1\n- 2", TypeError),
        ("", TypeError),
        ("\x00", ValueError),
    ],
)
def test_only_plain_yaml_of_names_and_values_is_read(tmp_path, text, kind):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(kind, match="config: expected"):
        configs.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match="config: expected a file .*nowhere"):
        configs.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: 3\nepochs: 4", "expected each name once in .*, got 'epochs' again"),
        ("epochs: !!timestamp x", "expected plain YAML in"),
        ("epochs: !!bool x", "expected plain YAML in"),
        ("epochs: 2001-99-99", "expected plain YAML in"),
        ("[" * 2000, "expected plain YAML in"),
        (f"seed: {10**30}", "expected seed to be an integer >= 0 of 32 bits"),
        ("seed: -1", "expected seed to be an integer >= 0, got -1"),
        (f"learning_rate: {10**400}", "expected learning_rate to be float, got 10"),
        ("weight: 1.0e+300", "expected weight to fit in 32 bits"),
        ("student: a b:c", "expected student as package.module:factory, got 'a b:c'"),
        ("teacher: ':'", "expected teacher as package.module:factory, got ':'"),
    ],
)
def test_what_yaml_can_say_and_no_run_can_mean(unchecked, text, sentence, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config: {sentence}"):
        configs.load(path)


def test_a_value_that_would_fill_the_screen_is_cut(unchecked, tmp_path):
    levels = [
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]"
        for a, b in itertools.pairwise("abcdefghi")
    ]
    text = "\n".join(["a: &a [x]", *levels])
    path = tmp_path / "config.yaml"
    path.write_text(f"{text}\nepochs: *i".replace("a: &a", "? epochs\n: &a", 1))
    with pytest.raises(ValueError) as caught:
        configs.load(path)
    assert len(str(caught.value)) < 2000
