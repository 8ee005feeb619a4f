"""The setup of all tests: 8 CPU devices, checked annotations, golden vectors."""

import os
from importlib.metadata import version
from pathlib import Path

# Both are read when jax starts, so they come before any import of it.
os.environ["JAX_PLATFORMS"] = "cpu"
flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",  # tests run side by side already
]
if "HINTJAX_COMPILE_FAST" in os.environ and version("jaxlib").startswith("0.10."):
    # Compilation takes 40 % less time. Programs are fused in another way, so tests of
    # equal bits of two programs run without it (the mark `bits`).
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

import gc
import multiprocessing.reduction
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

HERE = Path(__file__).parent

# JAX keeps its programs as millions of objects, over which Python's collector would
# walk again and again.
gc.set_threshold(100_000, 20, 100)

# Annotations are checked at run time, in tests only, and must be hooked in before
# hintjax is imported. The checks are the same on every Python, so one is enough.
if "HINTJAX_ANNOTATIONS_UNCHECKED" not in os.environ:
    jaxtyping.install_import_hook("hintjax", "beartype.beartype")

jax.config.update("jax_compilation_cache_dir", str(HERE.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)

hypothesis.settings.register_profile(
    "hintjax",
    max_examples=int(os.environ.get("HINTJAX_EXAMPLES", "6")),
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("hintjax")


def pytest_configure(config):
    # Another test process may be writing the entry of the cache that this one reads.
    config.addinivalue_line(
        "filterwarnings", "default:Error (reading|writing) persistent compilation cache"
    )


@pytest.fixture(autouse=True, scope="session")
def no_pickle():
    """No test unpickles anything, so no file that is read can run code.

    The queues of multiprocessing are excepted: they hold objects of this process and
    its workers only (TensorBoard's events and Grain's batches), and they imported
    `pickle.loads` earlier.
    """

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    assert multiprocessing.reduction.ForkingPickler.loads is pickle.loads
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(f"pickle.{name}", refuse)
        yield


@pytest.fixture
def strict():
    """Nothing in hintjax's own mathematics promotes a dtype or a rank by accident."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for users, so the library's own errors appear."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Golden:
    """One case of tests/golden: its arrays, and the errors of other arrays."""

    def __init__(self, name: str):
        path = HERE / "golden" / f"{name.replace('/', '__')}.npz"
        with np.load(path) as file:
            self.arrays = dict(file)

    def __getitem__(self, key: str) -> jax.Array:
        return jnp.asarray(self.arrays[key])

    def error(self, key: str, got) -> float:
        """max |got - want| / max |want|.

        A gradient that is 0 in exact arithmetic should be small against the others.
        """
        want, got = np.float64(self.arrays[key]), np.float64(got)
        np.testing.assert_equal(got.shape, want.shape)
        if key in self.arrays.get("zero", ()):
            return float(np.abs(got).max() / self.arrays["grad_scale"])
        return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` reads a case: `golden("hint/mse_equal")["in.f_s"]`."""
    return Golden


@pytest.fixture(scope="session")
def corners(tmp_path_factory):
    """A dataset in a file: 4 classes that differ in their brightest corner."""
    random = np.random.default_rng(0)
    label = np.arange(120) % 4
    image = random.integers(0, 60, (120, 8, 8), dtype=np.uint8)
    for i, corner in enumerate(label):
        row, column = divmod(int(corner), 2)
        image[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    path = tmp_path_factory.mktemp("data") / "corners.npz"
    np.savez(path, image=image, label=label)
    return str(path)
