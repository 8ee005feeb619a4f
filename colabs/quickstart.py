# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
# ---

# %% [markdown]
# # HintJAX: FitNets' two stages
#
# A plain network of 20 thin layers learns from a teacher of 3 wide layers. First its
# middle layer learns to predict the teacher's middle layer (the *hint stage*). Then the
# whole network learns the task (the *distillation stage*). Choose a TPU or GPU runtime;
# a CPU works too.

# %%
import importlib.util

if importlib.util.find_spec("hintjax") is None:
    # In a fresh runtime: install the clone, with jax for this device.
    import jax

    extra = ",tpu" if jax.default_backend() == "tpu" else ""
    # %pip install -q "..[data,viz$extra]"

# %% tags=["parameters"]
import os

STEPS = int(os.environ.get("HINTJAX_STEPS", "400"))  # of each stage
SMALL = "HINTJAX_STEPS" in os.environ

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import hintjax as hj
from hintjax.data import load, order, take
from hintjax.models import plain_thin, plain_wide

mesh = hj.data_mesh()
print(jax.devices())

# %% [markdown]
# ## Data
# These are scikit-learn's handwritten digits, decoded once and kept on the device as
# uint8. Batches are cut out inside jit. Each batch is split over all devices.

# %%
digits = load("digits")
BATCH = 64


@jax.jit
def batch_at(train, epoch_order, i):
    index = jax.lax.dynamic_slice(epoch_order, (i * BATCH,), (BATCH,))
    return take(train, index, digits.standardize)


def batches(steps):
    per_epoch = digits.train.n // BATCH
    for step in range(steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            epoch_order = order(jax.random.key(epoch), digits.train.n)
        batch = batch_at(digits.train, epoch_order, i)
        yield jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.P("data")))


example = next(batches(1))
test = take(digits.test, jnp.arange(digits.test.n), digits.standardize)

# %% [markdown]
# ## Networks and pairs
# The networks can be any Flax modules. Tracing lists the layers that can be a hint, and
# computes nothing.

# %%
student, teacher = hj.linen(plain_thin(10)), hj.linen(plain_wide(10))
key, image = jax.random.key(0), example["image"][:1]
fresh, taught = student.init(key, image), teacher.init(key, image)
pairs = hj.suggest_pairs(student.layers(*fresh, image), teacher.layers(*taught, image))
print("guided layer, hint layer:", pairs)

# %% [markdown]
# ## The loop
# Each batch gives one optax update step. The teacher and both stages use the same loop.


# %%
def train(stage, student, teacher=None, steps=STEPS):
    state = stage.init(key, student, teacher, example)
    history = []
    for step, batch in enumerate(batches(steps)):
        state, metrics = stage.update(state, teacher, batch)
        if step % 10 == 0:
            history.append((step, metrics))
    return state, jax.device_get(history)


def accuracy(network, variables):
    wants = hj.Wants(output=True)
    shown, _ = network.apply(*variables, test["image"], wants=wants, train=False)
    return float((shown.output.argmax(-1) == test["label"]).mean())


task = hj.task(optax.softmax_cross_entropy_with_integer_labels)
adam = optax.adam(2e-3)
alone = hj.distillation_stage(teacher, None, hj.objective(task=task), adam, mesh=mesh)
state, _ = train(alone, taught)
taught = hj.student_variables(state)
print(f"teacher: {accuracy(teacher, taught):.3f}")

# %%
hint = hj.hint_stage(
    student, teacher, hj.objective(hint=hj.fitnets(pairs)), adam, mesh=mesh
)
state, first = train(hint, fresh, taught)

loss = hj.objective(
    task=hj.weighted(task, 0.1), kd=hj.weighted(hj.kd(temperature=4.0), 0.9)
)
distill = hj.distillation_stage(student, teacher, loss, adam, mesh=mesh)
state, second = train(distill, hj.student_variables(state), taught)
hinted = accuracy(student, hj.student_variables(state))

# %% [markdown]
# The same student without the hint stage, with the same total number of steps:

# %%
state, _ = train(distill, fresh, taught, steps=2 * STEPS)
unhinted = accuracy(student, hj.student_variables(state))
print(f"with hints {hinted:.3f}, with KD alone {unhinted:.3f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(
    *zip(*[(step, metrics["hint/r2"]) for step, metrics in first], strict=True)
)
axes[0].set(title="hint stage", xlabel="step", ylabel="$R^2$ of the hint")
axes[1].plot(
    *zip(*[(step, metrics["task/accuracy"]) for step, metrics in second], strict=True)
)
axes[1].set(title="distillation stage", xlabel="step", ylabel="accuracy on the batch")
figure.tight_layout()

# %% [markdown]
# ## What a step costs on this device
# The table compares the step of every method with the sum of its unavoidable parts.

# %%
import pathlib
import subprocess
import sys

script = pathlib.Path("../benchmarks/step_time.py")
if script.exists():
    options = ["--small", "--rounds", "2", "--methods", "kd"] if SMALL else []
    done = subprocess.run(
        [sys.executable, str(script), *options],
        check=False,
        capture_output=True,
        text=True,
    )
    print(done.stdout or done.stderr)
else:
    print("Run this notebook from the folder colabs/ of a clone to see step times.")
