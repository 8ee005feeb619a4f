"""The cache of a run's teacher: planned, computed before training, and checked."""

import functools
import math
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hintjax import cache as caches
from hintjax._checks import Refusal, message
from hintjax.cache import Contents, Rows, contents, flat
from hintjax.cache.shards import missing, record_type
from hintjax.data import (
    IN_MEMORY,
    ON_DEVICE,
    Augment,
    Split,
    Standardize,
    View,
    steps_per_epoch,
    take,
)
from hintjax.experiments.cached_teacher import CachedTeacher, cached_crops
from hintjax.experiments.recipes import Recipe
from hintjax.experiments.setting import Setting, seen, taught_by
from hintjax.method import Method
from hintjax.networks import Variables
from hintjax.processes import told
from hintjax.sharding import replicated, spread
from hintjax.training import fingerprint

CACHE = "cache"  # in the run directory
_VERIFIED = 256  # rows that are computed again
_FREE = 0.9  # the part of the free disk that a cache may take


def with_cache(
    setting: Setting, path: Path, recipes: Sequence[Recipe], teacher: Variables
) -> Setting:
    """The setting with the teacher's features, which are computed if they are missing.

    Args:
        setting: setting of the runs.
        path: directory of the cache.
        recipes: recipes of all runs that share the cache.
        teacher: variables of the teacher.

    Raises:
        Refusal: if the cache does not fit on the disk, if the directory holds another
            cache, or if one of several processes does not see the directory.
    """
    methods = methods_of(setting, recipes)
    if not methods:
        return setting
    plan = contents_of(setting, methods, teacher)
    identity = identity_of(setting, plan, teacher)
    total = identity["total"]

    def encoded(teacher: Variables, batch: Mapping[str, Any]) -> dict[str, Array]:
        return plan.encode(plan.features(teacher, batch))

    compute = _compute(setting, encoded, teacher)
    nbytes, lacking = total * plan.nbytes, missing(path, plan.rows, total)
    said = f"{identity['views']} x {identity['examples']} images, {plan.nbytes} bytes "
    said += f"each ({setting.config.cache_dtype}), together {nbytes / 1e6:.1f} MB"
    told(lambda: _check_room(path, lacking * plan.nbytes, said))
    home = "on the device" if nbytes <= ON_DEVICE else "in the memory of the host"
    mapped = nbytes > IN_MEMORY
    home = "on disk" if mapped else home
    spent = "complete"
    if lacking:
        seconds = lacking * _seconds(compute, setting.config.batch_size)
        spent = f"about {seconds / jax.process_count():.0f} s"
    print(f"cache of the teacher: {said}, {home}; {spent}")
    caches.write(path, identity, plan.rows, total, compute)
    rows = caches.read(path, identity, mapped=mapped)
    placed = None
    if nbytes <= ON_DEVICE:
        mesh = setting.layout and setting.layout.mesh
        everything = flat(rows.everything())
        placed = (
            jax.device_put(everything)
            if mesh is None
            else spread(everything, replicated(mesh))
        )
    return setting._replace(cache=CachedTeacher(plan, rows, placed))


def _check_room(path: Path, nbytes: int, said: str) -> None:
    """Raises unless the disk has room for the rows that a cache lacks."""
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if nbytes > _FREE * free:
        wanted = f"a cache that fits on the disk, which has {free / 1e6:.1f} MB free"
        do = (
            "Store it in --cache-dtype bfloat16 or int8, use fewer --views, or choose "
            "a method or pairs with smaller features."
        )
        raise Refusal(message("cache", wanted, said, do))


def planned_cache(setting: Setting, recipes: Sequence[Recipe]) -> Setting:
    """The setting with a cache of zeros, which is as large as the cache of the runs.

    Numpy's zeros take no memory before they are read. Without --cache, the setting
    stays as it is.

    Args:
        setting: setting of the runs.
        recipes: recipes of all runs that share the cache.
    """
    if not setting.config.cache or setting.teacher is None:
        return setting
    methods = methods_of(setting, recipes)
    if not methods:
        return setting
    teacher = jax.eval_shape(setting.teacher.init, jax.random.key(0), setting.inputs)
    plan, n = contents_of(setting, methods, teacher), setting.dataset.train.n
    total = len(cached_crops(setting.config, n)) * n
    rows = Rows([np.zeros(total, record_type(plan.rows))], total, n)
    placed = None
    if rows.nbytes <= ON_DEVICE:
        placed = {
            name: np.zeros((total, math.prod(row.shape)), row.dtype)
            for name, row in plan.rows.items()
        }
    return setting._replace(cache=CachedTeacher(plan, rows, placed))


def verify(path: Path, setting: Setting, plan: Contents, teacher: Variables) -> None:
    """Recomputes some rows of a cache, and prints the errors of its features.

    Args:
        path: directory of the cache.
        setting: setting of the run.
        plan: the features that the cache holds.
        teacher: variables of the teacher.

    Raises:
        Refusal: if the cache belongs to another teacher, other data or other features,
            or is damaged or incomplete.
    """
    identity = identity_of(setting, plan, teacher)
    rows = caches.read(path, identity, mapped=True)
    total = identity["total"]
    some = np.random.default_rng().permutation(total)[:_VERIFIED]
    numbers = np.sort(some)
    index, view = numbers % rows.examples, numbers // rows.examples
    compute = _compute(setting, plan.features, teacher)
    stored = plan.decode(rows.read(index, view))
    live = {name: jnp.asarray(x) for name, x in compute(numbers).items()}
    print(f"{len(numbers)} of {total} rows, computed again")
    for name, ours in stored.items():
        theirs = live[name]
        error = float(jnp.abs(ours - theirs).max())
        low = float(cosines(ours, theirs).min())
        print(f"{name:40} largest error {error:.3g}  least cosine {low:.6f}")


def cosines(first: Array | np.ndarray, second: Array | np.ndarray) -> Array:
    """The cosine of two arrays, of each example; 1 where both are 0."""
    a, b = (
        jnp.asarray(x, jnp.float32).reshape(x.shape[0], -1) for x in (first, second)
    )
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    same = (a == b).all(1)
    return jnp.where(same, 1.0, (a * b).sum(1) / jnp.where(norms > 0, norms, 1.0))


def methods_of(setting: Setting, recipes: Sequence[Recipe]) -> list[Method]:
    """The methods of all phases that read features of the teacher."""
    config = setting.config
    per_epoch = steps_per_epoch(setting.dataset.train.n, config.batch_size)
    methods = [
        phase.method
        for recipe in recipes
        for phase in recipe(config, setting.places, per_epoch)
    ]
    return [m for m in methods if m.teacher.output or m.teacher.hints]


def contents_of(
    setting: Setting, methods: Sequence[Method], teacher: Variables
) -> Contents:
    """The features that the cache holds."""
    config, train = setting.config, setting.dataset.train
    size = config.batch_size
    key = jax.random.key(0)
    student = jax.eval_shape(setting.student.init, key, setting.inputs)
    batch = {"image": jax.ShapeDtypeStruct((size, *train.shape), jnp.float32)}
    return contents(
        setting.student,
        taught_by(setting),
        methods,
        student,
        teacher,
        batch,
        coding=config.cache_dtype,
        examples=train.n,
        views=len(cached_crops(config, train.n)),
    )


def identity_of(setting: Setting, plan: Contents, teacher: Variables) -> dict[str, Any]:
    """The values that must be equal when a cache is used again."""
    config, train = setting.config, setting.dataset.train
    crops = cached_crops(config, train.n)
    data = seen(setting.dataset)
    return {
        **plan.description,
        "teacher": fingerprint(teacher),
        "data": data["train"],
        "standardization": data["mean and std"],
        "augmentation": [config.pad, config.flip],
        "crops": zlib.crc32(crops.tobytes()),
        "views": len(crops),
        "examples": train.n,
        "total": len(crops) * train.n,
    }


def _compute(
    setting: Setting,
    function: Callable[[Variables, Mapping[str, Any]], dict[str, Array]],
    teacher: Variables,
) -> caches.Compute:
    """Makes `numbers of rows -> arrays`.

    Args:
        setting: setting of the runs.
        function: `(variables, batch) -> arrays` by name.
        teacher: variables of the teacher.
    """
    config, dataset = setting.config, setting.dataset
    train, size = dataset.train, config.batch_size
    crops = cached_crops(config, train.n)
    augment = Augment(pad=config.pad, flip=config.flip)

    @jax.jit
    def encode(
        variables: Variables, split: Split, standardize: Standardize, view: View
    ) -> dict[str, Array]:
        # The statistics are arguments, as in training: constants would be folded, and
        # the images would differ in their last bit.
        position = jnp.arange(size)
        batch = take(split, position, standardize, augment=augment, view=view)
        return function(variables, batch)

    def batch_of(index: np.ndarray, view: int) -> tuple[Split, Standardize, View]:
        shown = View(crops[view][index], np.asarray(view, np.int32))
        return train.read(index), dataset.standardize, shown

    one = functools.partial(encode, teacher)
    return caches.by_batches(lambda b: one(*b), batch_of, size, train.n)


def _seconds(compute: caches.Compute, size: int) -> float:
    """The seconds per row, measured on one batch."""
    compute(np.arange(size))  # compiles
    start = time.perf_counter()
    compute(np.arange(size))
    return (time.perf_counter() - start) / size
