"""The house: the imports that each room is allowed, from other rooms and from outside.

Nothing below `training/` imports it, and nothing below `experiments/` imports it. The
order of all chapters is `ORDER`.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PACKAGE = Path(__file__).parent.parent / "hintjax"

# Every entry of `ls hintjax`, from the ground up. A folder counts as one entry: its
# files may import each other (Python itself refuses a circle).
ORDER = (
    *("_checks", "_numerics", "losses", "metrics"),  # mathematics
    *("similarity", "probes"),  # how alike features are, and how good
    *("networks", "regressors"),  # models as pure functions
    *("processes", "sharding", "memory"),  # where arrays live
    *("method", "objective", "views", "teachers", "methods"),  # methods
    "pairing",  # which layers to match
    *("stages", "population", "export"),  # update steps
    *("models", "weights"),  # networks that are ready to use
    "data",
    *("training", "cache", "experiments", "cli"),  # the application
)
APPLICATION = ("training", "cache", "experiments", "cli")

MATHEMATICS = {"jax", "jaxtyping"}
MODELS = MATHEMATICS | {"flax", "numpy"}
UPDATES = MODELS | {"optax"}
# The packages that write and run files for devices; none is installed with hintjax.
WRITERS = {"jax2onnx", "tensorflow"}
RUNNERS = {"ai_edge_litert", "onnxruntime", "tflite_micro"}
# The packages that each room of the library may import, besides Python's own.
OUTSIDE = {
    "_checks": MATHEMATICS | {"numpy"},
    "_numerics": MATHEMATICS | {"numpy"},
    "losses": MATHEMATICS,
    "metrics": MATHEMATICS,
    "similarity": MATHEMATICS,
    "probes": MATHEMATICS,
    "networks": MODELS,
    "regressors": MODELS,
    "processes": MATHEMATICS | {"numpy"},
    "sharding": MODELS,
    "memory": MATHEMATICS,
    "method": MODELS,
    "objective": MODELS,
    "views": MODELS,
    "teachers": MODELS,
    "methods": MODELS,
    "pairing": MODELS,
    "stages": UPDATES,
    "population": UPDATES,
    "export": MODELS | WRITERS | RUNNERS,
    "models": MODELS,
    "weights": MODELS,
}
# Packages and modules that only one file or folder may import (or none). The packages
# that OUTSIDE does not restrict may be imported by data, training, experiments and cli.
ONLY_IN = {
    "flax.nnx": ("networks.nnx",),
    "matplotlib": ("experiments.pictures",),
    "matplotlib.pyplot": (),  # its state is global
    "orbax": ("training.checkpoints", "training.sealed"),
    "tensorflow": ("export.tflite",),
    "jax.experimental.jax2tf": ("export.tflite",),
    "jax2onnx": ("export.onnx",),
    "onnxruntime": ("export.runtimes",),
    "tflite_micro": ("export.runtimes",),
    "ai_edge_litert": ("export.runtimes", "export.c_array"),
}


def modules():
    """Yields (dotted name, file) of every module in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("hintjax", *path.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(module, source):
    """Dotted names of all imports of a file, also those inside its functions."""
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
    """Yields a sentence for each import of a file that breaks a rule."""
    mine, file = room(module), module.partition(".")[2]
    for name in imports(module, source):
        top = name.partition(".")[0]
        if top != "hintjax":
            if top not in OUTSIDE.get(mine, {top}) | sys.stdlib_module_names:
                yield f"{module} may not import {top}"
            for reserved, places in ONLY_IN.items():
                let = any(f"{file}.".startswith(f"{place}.") for place in places)
                if not let and f"{name}.".startswith(f"{reserved}."):
                    yield f"{module} may not import {name}: only {places} may"
            continue
        other = room(name)
        if other not in ORDER:
            yield f"{module} imports {name}, which has no place in ORDER"
        elif other != mine and ORDER.index(other) > ORDER.index(mine):
            yield f"{module} may not import {name}: it is below {other}"


def entries():
    """The Python files and folders that `ls hintjax` shows."""
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return found | {path.parent.name for path in PACKAGE.glob("*/*.py")}


def test_every_entry_has_one_place_and_every_place_an_entry():
    assert entries() == set(ORDER) and len(ORDER) == len(set(ORDER))
    assert set(ORDER) - set(OUTSIDE) == {"data", *APPLICATION}
    reserved = {file for places in ONLY_IN.values() for file in places}
    assert {f"hintjax.{file}" for file in reserved} <= set(MODULES)


@pytest.mark.parametrize("floor", ["training", "experiments"])
def test_nothing_below_a_floor_of_the_application_imports_it(floor):
    below = ORDER[: ORDER.index(floor)]
    wrong = {
        module: name
        for module, path in MODULES.items()
        if room(module) in below
        for name in imports(module, path.read_text(encoding="utf-8"))
        if f"{name}.".startswith(f"hintjax.{floor}.")
    }
    assert wrong == {}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"hintjax"}))
def test_a_file_imports_only_what_is_below_it(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert list(complaints(module, source)) == []


def test_the_table_of_contents_imports_only_hintjax():
    source = MODULES["hintjax"].read_text(encoding="utf-8")
    assert {name.partition(".")[0] for name in imports("hintjax", source)} <= {
        "hintjax",
        "typing",
    }


@pytest.mark.parametrize(
    "module, line",
    [
        ("hintjax.losses.kd", "import numpy as np"),
        ("hintjax.losses.kd", "def f():\n    import optax"),
        ("hintjax.methods.kd", "from optax import adam"),
        ("hintjax.stages.update", "import orbax.checkpoint as ocp"),
        ("hintjax.training.loop", "import orbax.checkpoint as ocp"),
        ("hintjax.data.records", "import tensorflow as tf"),
        ("hintjax.export.onnx", "def f():\n    from jax.experimental import jax2tf"),
        ("hintjax.cli", "import onnxruntime"),
        ("hintjax.cli", "from matplotlib.figure import Figure"),
        ("hintjax.experiments.pictures", "import matplotlib.pyplot as plt"),
        ("hintjax.experiments.report.page", "from matplotlib.figure import Figure"),
        ("hintjax.networks.linen", "from flax import nnx"),
        ("hintjax.stages", "import importlib\nimportlib.import_module('wandb')"),
        ("hintjax.losses.kd", "from hintjax.methods import kd"),
        ("hintjax.losses.kd", "from hintjax import stages"),
        ("hintjax.losses.kd", "from ..stages import Stage"),
        ("hintjax.stages.hint", "from hintjax import hint_loss"),
        ("hintjax.method", "def f():\n    from hintjax.training import fit"),
        ("hintjax.training.loop", "from hintjax.experiments import config"),
    ],
)
def test_an_import_that_breaks_a_rule_is_seen(module, line):
    assert list(complaints(module, line))


@pytest.mark.parametrize(
    "module, line",
    [
        ("hintjax.losses.kd", "from hintjax import _checks\nimport math"),
        ("hintjax.losses.kd", "from .hint import hint_loss"),
        ("hintjax.stages.update", "import optax\nfrom ..method import Method"),
        ("hintjax.methods", "from hintjax.methods.kd import kd"),
        ("hintjax.training.sealed", "import orbax.checkpoint as ocp"),
        ("hintjax.experiments.pictures.comparison", "import matplotlib.colors"),
    ],
)
def test_an_import_that_keeps_the_rules_is_let_through(module, line):
    assert not list(complaints(module, line))


# Packages that take seconds to import, or that a plain installation does not have.
HEAVY = (
    *("tensorflow", "tensorflow_datasets", "orbax", "grain", "matplotlib", "flax.nnx"),
    *("PIL", "sklearn", "tensorboardX", "tyro", "pandas", "torch"),
    *("jax2onnx", "ai_edge_litert", "onnxruntime", "tflite_micro"),
)


def test_import_is_light_and_touches_no_device():
    # The platform does not exist, so any use of a device raises.
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
