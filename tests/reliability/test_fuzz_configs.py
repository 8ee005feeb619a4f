"""Configs that nobody meant: each is accepted, or refused in a sentence; none hangs."""

import collections
import dataclasses
import faulthandler
import itertools
import math
import random
import re
import sys
import types

import flax.linen as nn
import numpy as np
import pytest
import yaml

from hintjax._checks import Refusal, WrongType
from hintjax.experiments import config as configs
from hintjax.experiments import distill, phases, plan, setting
from hintjax.models.blocks import GlobalAveragePool

SENTENCE = re.compile(r"[\w. ]+: expected .+, got ", re.DOTALL)  # as the command's
EXAMPLES = 24
HANGS = 120  # seconds; what is measured takes a few


class Net(nn.Module):
    """Three maps, the pooled vector, logits: all that most methods attach to."""

    width: int
    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        for number in range(1, 4):
            x = nn.relu(nn.Conv(self.width + number, (1, 1), name=f"conv{number}")(x))
        x = GlobalAveragePool(name="pool")(x)
        return nn.Dense(self.classes, name="classifier")(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny data set, files that are none, two small networks to import."""
    path = tmp_path_factory.mktemp("fuzz")
    tiny = types.ModuleType("tiny_networks")
    tiny.student = lambda classes: Net(2, classes)
    tiny.teacher = lambda classes: Net(3, classes)
    tiny.nothing = lambda classes: None
    image = np.random.default_rng(0).integers(0, 256, (EXAMPLES, 8, 8, 1), np.uint8)
    np.savez(path / "noise.npz", image=image, label=np.arange(EXAMPLES) % 3)
    (path / "text.npz").write_text("no arrays")
    (path / "empty.npz").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiny_networks", tiny)
        patch.chdir(path)
        yield path


BASE = {
    "dataset": "noise.npz",
    "student": "tiny_networks:student",
    "teacher": "tiny_networks:teacher",
    "batch_size": 8,
    "negatives": 4,
    "epochs": 3,
}
MORE = (  # of which one is added to the base
    {"method": "kd", "temperature": 2.0},
    {"method": "fitnets", "hint_epochs": 1, "hinted_rate": 0.5, "patience": 2},
    {"method": "fitnet", "pairs": ["conv2=conv1"], "weight": 10},
    {"method": "at", "kd_weight": 0.5, "optimizer": "sgd", "cosine": True},
    {"method": "backprop", "limit": 9, "size": 4, "pad": 1, "flip": True},
    {"method": "crd", "task_weight": 2.0, "weight_decay": 1e-4},
    {"method": "rkd", "layer_rates": ["conv2=0.5"], "seed": 7, "debug": True},
    {"compare": ["backprop", "kd"], "rates": [1e-3], "seeds": 1},
)
ANYTHING = (
    *(None, True, False, -1, 0, 1, 2, 7, 10**30, -(10**30), 10**400, 0.5, -0.5, 1e-300),
    *(1e300, math.nan, math.inf, -math.inf, "", " ", "a", "\0", "ünï—☃", "1", "nan"),
    *(
        "x" * 5000,
        "../..",
        [],
        [[]],
        [None],
        {},
        {"a": 1},
        [1, 2],
        ["a", "b"],
        [[["a"]]],
    ),
)
LIKELY = {
    "method": ("kdd", "KD", "crd_shared", "review", "sp", "tinybert", "hint", "nst"),
    "compare": (["kd", "kd"], ["kd", "nothing"], ["backprop"], ["at", "sp"]),
    "dataset": ("text.npz", "empty.npz", "missing.npz", ".npz", "/dev/null.npz"),
    "student": (
        *("hintjax.models:nothing", "hintjax.models", "no.such.module:net", ":", "a:"),
        *(
            "tiny_networks:nothing",
            "tiny_networks:none",
            ":net",
            "tiny_networks:",
            "a b:c",
        ),
    ),
    "teacher": (
        "missing",
        ".",
        "noise.npz",
        "no.such:net",
        ":",
        "tiny_networks:nothing",
    ),
    "pairs": (
        *(["conv1=conv3"], ["conv1=nothing"], ["nothing=conv1"], ["conv1:in=conv1:in"]),
        *(["conv1[0]=conv1"], ["=conv1"], ["conv1="], ["a=b=c"], ["conv1=conv1"] * 2),
        *(
            ["conv1.call=conv1"],
            ["conv1#3=conv1"],
            ["pool=pool"],
            ["pool=conv1"],
            ["=="],
        ),
        *(["classifier=conv1"], ["/=/"], ["conv1=conv1", "conv2=conv2", "conv3=conv3"]),
    ),
    "batch_size": (16, 24, EXAMPLES + 1, 10**6),
    "limit": (1, 8, EXAMPLES + 1, 10**9),
    "size": (1, 3, 16, 10**6),
    "pad": (8, 100, 2**31),
    "epochs": (1, 2, 10**6),
    "hint_epochs": (1, 2, 3, 4),
    "optimizer": ("adamw", "Adam", "sgd"),
    "seed": (-1, 2**31, 2**63),
    "rates": ([0.0], [-1.0], [math.nan], [1, 2]),
}
BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]"
        for a, b in itertools.pairwise("abcdefghi")
    ]
)
TEXTS = (
    *(
        "",
        "\0",
        "- a",
        "just text",
        "3",
        "null",
        "a: b: c",
        "{",
        "}",
        "[",
        "]",
        "*a",
        "&a",
    ),
    *("%YAML 9.9", "---\na: 1\n---\nb: 2", "<<: 3", "<<: {epochs: 3}", "? [a]\n: b"),
    *("{1: 2}", "{null: 1}", "{[a]: b}", "epochs: 2001-99-99"),
    *(
        "epochs: !!int ''",
        "epochs: !!bool x",
        "epochs: !!float x",
        "epochs: !!timestamp x",
    ),
    *(
        "epochs: !!binary x",
        "a: !!python/object:os.system ''",
        "!!python/name:os.system",
    ),
    *("epochs: !!set {a}", "epochs: !!omap [a: 1]", "epochs: =", "epochs: 0x", "\t"),
    *(
        "epochs: &a [*a]",
        "? &a [*a]\n: 1",
        "epochs: &a {a: *a}",
        "[" * 2000,
        "{a: " * 2000,
    ),
    *(
        "epochs: 3\nepochs: 4",
        "a" * 100_000,
        "epochs: " + "9" * 5000,
        BOMB,
        f"epochs: 3\n{BOMB}",
    ),
    BOMB.replace("i: &i", "epochs: &i"),
    "\ud800",
)


def mutated(number):
    """The text of a config, as bytes; the same for the same number."""
    draw = random.Random(number)
    fields = BASE | draw.choice(MORE)
    known = [field.name for field in dataclasses.fields(configs.Config)]
    known.remove("devices")  # of the machine that tests
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(known)
        way = draw.random()
        if way < 0.1:
            letters = list(draw.choice([*fields]))
            letters.insert(draw.randrange(len(letters)), draw.choice("_xÜ"))
            fields["".join(letters)] = draw.choice(ANYTHING)
        elif way < 0.15:
            fields[draw.choice((3, None, True, 0.5, "", "dataset "))] = "digits"
        elif way < 0.2:
            fields.pop(draw.choice(["negatives", "epochs", "batch_size"]), None)
        elif way < 0.6:
            name = draw.choice([*LIKELY])
            fields[name] = draw.choice(LIKELY[name])
        else:
            fields[name] = draw.choice(ANYTHING)
    text = yaml.safe_dump(fields, allow_unicode=draw.random() < 0.5)
    way = draw.random()
    if way < 0.15:
        text = draw.choice(TEXTS)
    elif way < 0.2:
        text = text[: draw.randrange(len(text))]
    elif way < 0.25:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice("{}[]:&*!|>'\"%@`#-?,\n\t\0é") + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.03:
        at = draw.randrange(len(data) + 1)
        data = data[:at] + draw.randbytes(3) + data[at:]
    return data


def followed(path):
    """A config on the way that the command goes, up to the first step of training."""
    config = configs.load(path)
    used = plan.planned(config).recipes
    prepared = setting.prepare(config, teach=config.method != "backprop")
    for recipe in used:
        phases.check(prepared, recipe)
    return config


def outcome(number, folder):
    """None for a config that is accepted, or the error that refuses it."""
    path = folder / "config.yaml"
    path.write_bytes(mutated(number))
    try:
        followed(path)
    except Refusal as error:
        assert SENTENCE.match(str(error)), (number, path.read_bytes()[:400])
        assert len(str(error)) < 5000
        return error
    return None


def counted(found):
    """How many were accepted, refused, and refused for a type or a file."""
    kinds = {None: "accepted", Refusal: "refused", WrongType: "type"}
    outcomes = (error if error is None else type(error) for error in found.values())
    return collections.Counter(kinds.get(kind, "file") for kind in outcomes)


def test_mutated_configs_are_accepted_or_refused_in_a_sentence(unchecked, folder):
    found = counted({number: outcome(number, folder) for number in range(45)})
    assert found["accepted"] >= 3 and found["refused"] >= 25


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:16]))
def test_damaged_yaml_is_refused_in_a_sentence(unchecked, text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if text == "<<: {epochs: 3}":
        assert configs.load(path).epochs == 3
        return
    with pytest.raises((ValueError, TypeError), match=SENTENCE) as caught:
        configs.load(path)
    assert len(str(caught.value)) < 2000


@pytest.mark.long
def test_a_thousand_mutated_configs(unchecked, folder, tmp_path):
    """An accepted one is trained too, of which fifteen are tried."""
    found = {}
    for number in range(1000):
        faulthandler.dump_traceback_later(HANGS, exit=True)
        found[number] = outcome(number, folder)
        faulthandler.cancel_dump_traceback_later()
    counts = counted(found)
    print(dict(counts))
    assert counts["accepted"] >= 50 and counts["refused"] >= 500
    assert counts["type"] and counts["file"]
    accepted = [number for number, error in found.items() if error is None]
    for number in random.Random(0).sample(accepted, 15):
        path = folder / "config.yaml"
        path.write_bytes(mutated(number))
        config = dataclasses.replace(
            configs.load(path),
            epochs=2,
            hint_epochs=None,
            teacher_epochs=1,
            teacher_at_least=0.0,
            devices=1,  # many would wait for each other on few cores
            fsdp=1,
            seeds=1,
        )
        distill.distill(config, tmp_path / str(number))
