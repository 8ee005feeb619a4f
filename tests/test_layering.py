"""The order of the house: a file imports only files above it, and only what it may."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parent.parent / "hintjax"

# Every file or folder of the package, from the ground up. Files of one folder may
# import each other (Python itself refuses a circle); a folder counts as one entry.
ORDER = (
    *("_checks", "_numerics", "losses", "processes", "sharding", "memory"),
    *("paths", "networks", "networks_nnx", "precision", "regressors"),
    *("method", "views"),
    *("teachers", "methods"),
    *("pairing", "balance"),
    *("accumulation", "carry", "feeding", "reports", "spikes", "debugging"),
    *("stages", "population"),
    *("rundir", "signals"),
    *("cache", "checkpoint"),
    *("models", "weights", "metrics", "config", "data", "viz", "export"),
    *("train", "places", "recipes", "experiment", "compare", "cli"),
)

MATHEMATICS = {"jax", "jaxtyping"}
MODELS = MATHEMATICS | {"flax", "numpy"}
TRAINING = MODELS | {"chex", "optax"}
# What each may import from outside, besides the standard library.
OUTSIDE = {
    "_checks": MATHEMATICS | {"numpy"},
    "_numerics": MATHEMATICS | {"numpy"},
    "losses": MATHEMATICS,
    "memory": MATHEMATICS,
    "paths": MATHEMATICS,
    "networks": MODELS,
    "networks_nnx": MODELS,
    "precision": MODELS,
    "regressors": MODELS,
    "method": MODELS,
    "views": MODELS,
    "teachers": MODELS,
    "methods": MODELS,
    "pairing": MODELS,
    "balance": MODELS,
    "sharding": MODELS,
    "accumulation": MATHEMATICS,
    "carry": MATHEMATICS,
    "feeding": TRAINING,
    "reports": MATHEMATICS,
    "spikes": MATHEMATICS,
    "debugging": MODELS,
    "stages": TRAINING,
    "population": TRAINING,
    "processes": MATHEMATICS | {"numpy"},
    "rundir": MATHEMATICS,
    "signals": MATHEMATICS,
    "cache": TRAINING,
    "checkpoint": TRAINING | {"orbax"},
    "models": MODELS,
    "weights": MODELS,
    "metrics": MODELS | {"rich", "tensorboardX"},
    "config": {"yaml"},
}
# The others may import anything but this, which has one place (or none).
ONLY_IN = {
    "flax.nnx": "networks_nnx",
    "matplotlib": "viz",
    "matplotlib.pyplot": "nothing: its state is global",
    "orbax": "checkpoint",
    "tensorflow": "nothing: it is not installed with hintjax",
}


def modules():
    """(dotted name, file) of everything in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("hintjax", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(module, source):
    """Dotted names of all that a file imports, also inside its functions."""
    package = module if MODULES[module].name == "__init__.py" else parent(module)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            absolute = [*base, *filter(None, [node.module])] if node.level else []
            start = ".".join(absolute) or node.module
            found += [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = node.args[:1]
            found += [name.value for name in names if isinstance(name, ast.Constant)]
    return found


def parent(module):
    return module.rpartition(".")[0]


def room(module):
    """The entry of ORDER that a module of hintjax belongs to; "" is hintjax itself."""
    return module.partition(".")[2].partition(".")[0]


def complaints(module, source):
    """What a file imports and may not, in words."""
    mine = room(module)
    for name in imports(module, source):
        top = name.partition(".")[0]
        if top != "hintjax":
            if top not in OUTSIDE.get(mine, {top}) | sys.stdlib_module_names:
                yield f"{module} may not import {top}"
            for reserved, place in ONLY_IN.items():
                if mine != place and f"{name}.".startswith(f"{reserved}."):
                    yield f"{module} may not import {name}: only in {place}"
            continue
        other = room(name)
        if other not in ORDER:
            yield f"{module} imports {name}: from a file above it instead"
        elif other != mine and ORDER.index(other) > ORDER.index(mine):
            yield f"{module} may not import {name}: it stands below {mine}"


def test_every_file_has_its_place():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms <= set(ORDER), f"not in ORDER: {sorted(rooms - set(ORDER))}"
    assert set(OUTSIDE) <= set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"hintjax"}))
def test_a_file_imports_only_what_is_above_it(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert list(complaints(module, source)) == []


def test_the_table_of_contents_imports_only_hintjax():
    source = MODULES["hintjax"].read_text(encoding="utf-8")
    assert {name.partition(".")[0] for name in imports("hintjax", source)} <= {
        "hintjax"
    }


@pytest.mark.parametrize(
    "module, line",
    [
        ("hintjax.losses.kd", "import numpy as np"),
        ("hintjax.losses.kd", "def f():\n    import optax"),
        ("hintjax.methods.kd", "from optax import adam"),
        ("hintjax.stages", "import orbax.checkpoint as ocp"),
        ("hintjax.data", "import tensorflow as tf"),
        ("hintjax.cli", "from matplotlib.figure import Figure"),
        ("hintjax.viz", "import matplotlib.pyplot as plt"),
        ("hintjax.networks", "from flax import nnx"),
        ("hintjax.metrics", "import importlib\nimportlib.import_module('wandb')"),
        ("hintjax.losses.kd", "from hintjax.methods import kd"),
        ("hintjax.losses.kd", "from hintjax import stages"),
        ("hintjax.losses.kd", "from ..stages import Stage"),
        ("hintjax.stages", "from hintjax import hint_loss"),
        ("hintjax.method", "def f():\n    from hintjax.train import fit"),
    ],
)
def test_what_is_not_allowed_is_seen(module, line):
    assert list(complaints(module, line))


@pytest.mark.parametrize(
    "module, line",
    [
        ("hintjax.losses.kd", "from hintjax import _checks\nimport math"),
        ("hintjax.losses.kd", "from .hint import hint_loss"),
        ("hintjax.stages", "import optax\nfrom .method import Method"),
        ("hintjax.methods", "from hintjax.methods.kd import kd"),
    ],
)
def test_what_is_allowed_is_let_through(module, line):
    assert not list(complaints(module, line))


# Other packages that take seconds, or that a plain installation does not have.
HEAVY = (
    *("tensorflow", "tensorflow_datasets", "orbax", "grain", "matplotlib", "flax.nnx"),
    *("PIL", "sklearn", "tensorboardX", "tyro", "pandas", "torch"),
)


def test_import_is_light_and_touches_no_device():
    # With a platform that does not exist, whatever needs a device raises.
    code = (
        "import sys, hintjax\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
        "import jax\n"
        "try:\n"
        "    jax.devices()\n"
        "except RuntimeError:\n"
        "    print('untouched')\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "none_at_all"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    heavy, touched = result.stdout.splitlines()
    assert heavy == "" and touched == "untouched"
