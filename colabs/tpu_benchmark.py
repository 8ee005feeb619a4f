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
# # HintJAX on a TPU: what every step costs
#
# A WRN-40-2 teaches a WRN-16-2 on random images. For every core method and both stages
# this notebook measures images per second, the part of the chip's peaks that a step
# reaches, the seconds of compilation, and what a cache of the teacher's features saves.
# At the end, 8 students learn under one teacher. Choose a TPU runtime; all of its chips
# are used. Run it from the folder `colabs/` of a clone.

# %%
import importlib.util

if importlib.util.find_spec("hintjax") is None:
    # In a fresh runtime: install the clone, with jax for this device.
    import jax

    extra = ",tpu" if jax.default_backend() == "tpu" else ""
    # %pip install -q "..[viz$extra]"

# %% tags=["parameters"]
import os

SMALL = "HINTJAX_STEPS" in os.environ  # tiny networks and few steps, as a test
STEPS = int(os.environ.get("HINTJAX_STEPS", "50"))  # in each round

# %%
import sys

import jax
from IPython.display import display

sys.path.insert(0, "../benchmarks")
import on_device

print(jax.devices())
options = ["--steps", f"{STEPS}", "--out", "on_device.json"]
if SMALL:
    options += ["--small", "--rounds", "2", "--methods", "kd", "--no-population"]

# %% [markdown]
# ## The table
# `FLOPs` and `HBM` are parts of the chip's published peaks, by the compiler's counts of
# operations and bytes. `predicted` is the time in ms of a model that knows only these
# counts and the collectives. `cached/live` is the time of a step that reads features of
# the teacher from the device, relative to a step that computes them.

# %%
record = on_device.main(options)

# %% [markdown]
# ## The plot

# %%
display(on_device.plot(record, None))

# %% [markdown]
# ## The numbers, to keep

# %%
if importlib.util.find_spec("google.colab") is not None:
    from google.colab import files

    files.download("on_device.json")
else:
    print("The numbers are in on_device.json.")
