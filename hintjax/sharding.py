"""Meshes, and where arrays live on them.

A mesh has an axis `data`, or `fsdp`, or both: batches are split over all of them.
Parameters are on every device, except that on an axis `fsdp` each large one is stored
in shares, and that rules, or Flax's metadata, may place any of them otherwise. Inside
a step, what was stored in shares over the batch's axes is whole again: weights are
gathered, and activations are not. What is split over another axis, such as `model`,
stays split.

Metadata are the names that `nn.with_partitioning`, `nn.with_logical_partitioning` or
`nnx.with_partitioning` give the axes of a parameter. Such parameters stay in the boxes
that Flax's `init` puts them in, in a stage's state and its optimiser's, too: that is
what `module.apply` and `nn.get_partition_spec` take. `nn.unbox` takes the arrays out,
for an export (`hintjax.training.save_tree`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from hintjax._checks import Refusal, message, nearest, positive_int
from hintjax.processes import agree

BATCH = ("data", "fsdp")  # the axes that split batches
NO_RULES: Mapping[str, PartitionSpec] = MappingProxyType({})
Axes = str | tuple[str, ...] | None
# Shapes of batches, with their mesh, that all processes have.
_AGREED: set[tuple] = set()
NO_NAMES: Mapping[str, Axes] = MappingProxyType({})


class Layout(NamedTuple):
    """A mesh, and which parameters are stored in shares.

    Attributes:
        mesh: the mesh; see `make_mesh`.
        rules: regular expressions and the `PartitionSpec` of the parameters whose path
            they are found in, such as `{"head/kernel$": PartitionSpec(None, "model")}`.
            Paths begin with "student/", "regressors/" or "teacher/". The first that is
            found counts; one that is found nowhere is an error. The optimiser's state
            lives where its parameters do.
        at_least: what neither a rule nor metadata place is split over `fsdp`, if the
            mesh has it, along its largest axis that divides, if it has at least so many
            entries.
        logical: the axes of the mesh that the names in Flax's metadata stand for, such
            as `{"embed": None, "heads": "model"}`; None for an axis that is not split.
            As in Flax, an axis of the mesh splits an array once: the first name here
            has it. Names that are axes of the mesh need not be here. Metadata count
            where no rule does, and where they split nothing, nothing is split.
    """

    mesh: Mesh
    rules: Mapping[str, PartitionSpec] = NO_RULES
    at_least: int = 2**16
    logical: Mapping[str, Axes] = NO_NAMES


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int | None = None,
    model: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `model`, those that are given a size.

    Args:
        data: devices along `data`; by default all that are left by the others.
        fsdp: devices along `fsdp`, over which large parameters are split too.
        model: devices along `model`, for rules that split layers.
        devices: all devices by default.

    Returns:
        The mesh. Its axes are Auto: under Explicit axes, the default of
        `jax.make_mesh`, Flax's convolutions have no backward pass.

    Raises:
        ValueError: if the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    positive_int("make_mesh", **sizes)
    rest = math.prod(sizes.values())
    if data is None:
        sizes = {"data": max(len(devices) // rest, 1), **sizes}
    if math.prod(sizes.values()) != len(devices):
        do = "Choose sizes whose product it is."
        wanted = f"axes that make up {len(devices)} devices"
        raise Refusal(message("make_mesh", wanted, f"{sizes}", do))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=devices,
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over which batches are split.

    Args:
        devices: all devices by default.

    Returns:
        The mesh; see `make_mesh`.
    """
    return make_mesh(devices=devices)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that split batches.

    Raises:
        ValueError: if there is none.
    """
    axes = tuple(name for name in BATCH if name in mesh.axis_names)
    if not axes:
        do = "Make one with hintjax.make_mesh."
        wanted = f"a mesh with an axis {' or '.join(BATCH)}"
        raise Refusal(message("mesh", wanted, f"{mesh.axis_names}", do))
    return axes


def shares(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data` and `fsdp`."""
    axes = batch_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(axes if len(axes) > 1 else axes[0]))


def check_batch(batch: PyTree, mesh: Mesh) -> None:
    """Raises unless the examples of a batch can be shared out evenly."""
    parts = shares(mesh)
    check_even(batch, parts, f"{parts} devices")


def check_even(batch: PyTree, parts: int, those: str) -> None:
    """Raises unless there are as many examples for each of those parts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        n = leaf.shape[0] if leaf.ndim else 0
        if n == 0 or n % parts:
            low = n - n % parts
            sizes = [f"{size}" for size in (low, low + parts) if size > 0]
            wanted = f"batches whose size {those} can share evenly"
            got = f"{_name(path)!r} of shape {tuple(leaf.shape)}"
            do = (
                f"Use a multiple of {parts}, such as {' or '.join(sizes)}, or fill it "
                f'up and say in "where" which examples count.'
            )
            raise Refusal(message("batch", wanted, got, do))


def check_spans(batch: PyTree, mesh: Mesh) -> None:
    """Raises if the mesh has several processes, and a batch only one's examples."""
    if not mesh.is_multi_process:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        # What is traced, or only a shape to compile for, has no place yet.
        shape = isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
        if not shape and getattr(leaf, "is_fully_addressable", True):
            wanted = "a batch on the devices of all processes"
            got = f"{_name(path)!r}, which is this process' own"
            do = "Make it one with hintjax.sharding.from_process."
            raise Refusal(message("batch", wanted, got, do))


def check_rules(layout: Layout, params: PyTree) -> None:
    """Raises if there is a rule that no parameter answers to."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    paths = [_name(path) for path, _ in leaves]
    for rule in layout.rules:
        if not any(re.search(rule, path) for path in paths):
            got = f"{rule!r}, which none does"
            do = f"The nearest are {nearest(rule, paths)}."
            wanted = "rules that match a parameter's path"
            raise Refusal(message("layout", wanted, got, do))


def stored(layout: Layout, params: PyTree) -> PyTree:
    """The sharding that each parameter is stored with.

    Args:
        layout: mesh and rules.
        params: the parameters, or their shapes; their paths are what rules see.

    Returns:
        A tree of `NamedSharding`, of the same structure.

    Raises:
        ValueError: if a rule's spec has more axes than an array, names one that the
            mesh has not, or does not divide; if a name in metadata is unknown.
    """

    def place(path, leaf):
        box, leaf = (leaf, leaf.value) if _is_box(leaf) else (None, leaf)
        spec = _spec(layout, _name(path), tuple(leaf.shape), box)
        sharding = NamedSharding(layout.mesh, spec)
        return sharding if box is None else box.replace_boxed(sharding)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=_is_box)


def whole(shardings: PyTree) -> PyTree:
    """The same shardings, without the axes that split batches: as a step computes."""

    def gather(sharding):
        kept = [
            tuple(name for name in _names(entry) if name not in BATCH) or None
            for entry in sharding.spec
        ]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    return jax.tree.map(gather, shardings)


def alike(shardings: PyTree, params: PyTree, tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree in which parameters recur, as in an optimiser's state.

    What has the shape of a parameter and a path that ends with its path is stored as
    it is; all else is replicated.
    """
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def place(path, leaf):
        for cut in range(len(path)):
            shape, sharding = known.get(path[cut:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def spread(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process has, as arrays on the devices of all of them.

    In one process this is `jax.device_put`.

    Args:
        tree: arrays; in several processes, the same in each, or already on a mesh.
        shardings: one for all, or a tree that begins like `tree`.

    Returns:
        The same arrays, where the shardings say.
    """
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(partial(_spread, sharding), part),
        shardings,
        tree,
    )


def _spread(sharding, leaf):
    if isinstance(leaf, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(leaf, sharding)
    elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or elsewhere:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _spread(sharding, jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])


def from_process(batch: PyTree, mesh: Mesh | Layout) -> PyTree:
    """One batch of the whole mesh, of which each process has read its share.

    Args:
        batch: this process' examples: of a batch of B, B / `jax.process_count()`. Its
            shapes change in all processes at once, if at all.
        mesh: the stage's.

    Returns:
        The batch as the stage wants it, split over `data` and `fsdp`.
    """
    mesh = mesh.mesh if isinstance(mesh, Layout) else mesh
    sharding = over_batch(mesh)
    # Of the parts of a batch, those that this process holds.
    ours = max(shares(mesh) * mesh.local_mesh.size // mesh.size, 1)
    check_even(batch, ours, f"the {ours} devices of a process")
    shapes = {
        _name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    known = (mesh, *shapes.items())
    if mesh.is_multi_process and known not in _AGREED:
        # Each would compute with another batch, and none would notice.
        agree("shapes of their batches", shapes)
        _AGREED.add(known)
    return jax.tree.map(
        partial(jax.make_array_from_process_local_data, sharding), batch
    )


def place(variables: PyTree, mesh: Mesh | Layout) -> PyTree:
    """A teacher's variables, where a stage on this mesh wants them.

    `update` would send a teacher that lives elsewhere to all devices at every step.

    Args:
        variables: `(params, state)`, as a network's `init` gives them.
        mesh: the stage's.

    Returns:
        The same variables, of the same type.
    """
    layout = mesh if isinstance(mesh, Layout) else Layout(mesh)
    params, state = variables
    homes = stored(layout, {"teacher": params})["teacher"]
    return variables._replace(
        params=spread(params, homes),
        state=spread(state, replicated(layout.mesh)),
    )


def _spec(layout, path, shape, box):
    """The `PartitionSpec` of one parameter, which may be in a box with metadata."""
    mesh = layout.mesh
    for rule, spec in layout.rules.items():
        if re.search(rule, path):
            _check_spec(f"layout: {rule!r}", spec, path, shape, mesh)
            return spec
    if box is not None:
        spec = _annotated(layout, path, box)
        _check_spec("layout: metadata", spec, path, shape, mesh)
        return spec
    parts = mesh.shape.get("fsdp", 1)
    axes = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < layout.at_least:
        return PartitionSpec()
    largest = max(axes, key=lambda i: shape[i])
    return PartitionSpec(*[None] * largest, "fsdp")


def _annotated(layout, path, box):
    """The `PartitionSpec` that metadata give."""
    axes = layout.mesh.axis_names
    # Flax's own rules, of `nn.with_logical_partitioning`, come after the layout's.
    rules = (*layout.logical.items(), *(getattr(box, "rules", None) or ()))
    rules += tuple((axis, axis) for axis in axes)
    known = [name for name, _ in rules]
    for name in (name for entry in box.names for name in _names(entry)):
        if name not in known:
            wanted = f"metadata of axes {axes} or of names in logical="
            near = ", ".join(nearest(name, known))
            do = f"Nearest: {near}; or add logical={{{name!r}: None}}."
            raise Refusal(message("layout", wanted, f"{name!r} of {path!r}", do))
    return nn.logical_to_mesh_axes(box.names, rules)


def _is_box(node):
    """Whether it is a parameter with names of its axes."""
    return isinstance(node, nn.Partitioned)


def _check_spec(caller, spec, path, shape, mesh):
    names = [_names(entry) for entry in spec]
    unknown = [n for entry in names for n in entry if n not in mesh.axis_names]
    if unknown:
        wanted = f"axes among {mesh.axis_names}"
        raise Refusal(message(caller, wanted, f"{spec}"))
    if len(names) > len(shape):
        wanted = f"at most the {len(shape)} axes of {path!r}"
        raise Refusal(message(caller, wanted, f"{spec}"))
    for size, entry in zip(shape, names, strict=False):
        parts = math.prod(mesh.shape[name] for name in entry)
        if size % parts:
            wanted = f"{spec} to divide {path!r} evenly"
            raise Refusal(message(caller, wanted, f"{shape} over {parts} devices"))


def _names(entry: str | Iterable[str] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
