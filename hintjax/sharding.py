"""Meshes, and where arrays live on them.

A mesh has an axis `data`, or `fsdp`, or both: batches are sharded over all of them.
Parameters are replicated on every device, with two exceptions: large parameters are
sharded over an axis `fsdp`, and rules or Flax's metadata may place any parameter
otherwise. Inside a step, parameters that are sharded over the batch's axes are
gathered, and activations are not. Parameters that are sharded over another axis, such
as `model`, stay sharded.

Metadata are the names that `nn.with_partitioning`, `nn.with_logical_partitioning` or
`nnx.with_partitioning` give the axes of a parameter. Such parameters stay in the boxes
that Flax's `init` puts them in, because `module.apply` and `nn.get_partition_spec`
expect the boxes. The same holds in the state of a stage and of its optimizer.
`nn.unbox` takes the arrays out, for an export (`hintjax.training.save_tree`).
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import logical_to_mesh_axes
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from hintjax._checks import Refusal, message, nearest, positive_int
from hintjax.processes import agree

if TYPE_CHECKING:
    Device = Any  # jaxlib has no stubs
else:
    Device = jax.Device

BATCH = ("data", "fsdp")  # the axes over which batches are sharded
NO_RULES: Mapping[str, PartitionSpec] = MappingProxyType({})
Axes = str | tuple[str, ...] | None
# Shapes of batches, with their mesh, on which all processes agree.
_AGREED: set[tuple[object, ...]] = set()
NO_NAMES: Mapping[str, Axes] = MappingProxyType({})


class Layout(NamedTuple):
    """A mesh, and how parameters are sharded over it.

    Attributes:
        mesh: the mesh; see `make_mesh`. Explicit axes are used as Auto axes.
        rules: regular expressions, each with the `PartitionSpec` of the parameters
            whose path it matches, such as
            `{"head/kernel$": PartitionSpec(None, "model")}`.
            Paths begin with "student/", "regressors/" or "teacher/". The first rule
            that matches counts; a rule that matches nothing is an error. The state of
            the optimizer is placed like its parameters.
        at_least: parameters with at least this many entries are sharded over `fsdp`, if
            the mesh has it, along their largest divisible axis, unless a rule or
            metadata places them.
        logical: the axes of the mesh that the names in Flax's metadata stand for, such
            as `{"embed": None, "heads": "model"}`; None for an axis that is not
            sharded. As in Flax, an axis of the mesh shards an array once: the first
            name here takes it. Names that are axes of the mesh need no entry. Metadata
            count where no rule matches; a parameter that they do not shard is
            replicated.
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
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """A mesh with each of the axes `data`, `fsdp` and `model` that has a size.

    Args:
        data: devices along `data`; by default, all devices that the other axes leave.
        fsdp: devices along `fsdp`, over which large parameters are sharded, too.
        model: devices along `model`, for rules that shard layers.
        devices: all devices by default.

    Returns:
        The mesh. Its axes are Auto: under Explicit axes, the default of
        `jax.make_mesh`, Flax's convolutions have no backward pass.

    Raises:
        ValueError: if the product of the sizes is not the number of devices.
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


def data_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over which batches are sharded.

    Args:
        devices: all devices by default.

    Returns:
        The mesh; see `make_mesh`.
    """
    return make_mesh(devices=devices)


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes, under which Flax's layers work.

    The axes of `jax.make_mesh` are Explicit by default: every operation would then have
    to say how its result is sharded.

    Args:
        mesh: any mesh.

    Returns:
        The very same mesh, if none of its axes is Explicit.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return mesh
    kinds = [
        AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types
    ]
    return Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(kinds))


@contextlib.contextmanager
def in_automatic_mesh() -> Iterator[None]:
    """While open, the mesh of an outer `jax.set_mesh` has Auto axes."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        yield
        return
    with jax.set_mesh(automatic(jax.sharding.get_mesh())):
        yield


def on_automatic(tree: PyTree) -> PyTree:
    """The same arrays; arrays on a mesh with Explicit axes are on it with Auto axes.

    Nothing is copied to another device.
    """

    def one(leaf: Any) -> Any:
        if not is_explicit(leaf):
            return leaf
        there = NamedSharding(automatic(leaf.sharding.mesh), leaf.sharding.spec)
        return jax.device_put(leaf, there)

    return jax.tree.map(one, tree)


def is_explicit(leaf: Any) -> bool:
    """Whether an array is on a mesh with Explicit axes."""
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return False
    mesh = getattr(leaf.sharding, "mesh", None)
    return isinstance(mesh, Mesh) and automatic(mesh) is not mesh


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh over which batches are sharded.

    Raises:
        ValueError: if the mesh has no such axis.
    """
    axes = tuple(name for name in BATCH if name in mesh.axis_names)
    if not axes:
        do = "Make one with hintjax.make_mesh."
        wanted = f"a mesh with an axis {' or '.join(BATCH)}"
        raise Refusal(message("mesh", wanted, f"{mesh.axis_names}", do))
    return axes


def shares(mesh: Mesh) -> int:
    """The number of parts into which a batch is sharded."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of the leading axis over `data` and `fsdp`."""
    axes = batch_axes(mesh)
    spec = PartitionSpec(axes[0] if len(axes) == 1 else axes)
    return NamedSharding(automatic(mesh), spec)


def check_batch(batch: PyTree, mesh: Mesh) -> None:
    """Raises unless the devices of a mesh can share a batch evenly."""
    parts = shares(mesh)
    check_even(batch, parts, f"{parts} devices")


def check_even(batch: PyTree, parts: int, sharers: str) -> None:
    """Raises unless every part of a batch has the same number of examples.

    Args:
        batch: arrays with a leading axis of examples.
        parts: the number of parts.
        sharers: the name of the parts in the message, such as "8 devices".
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        n = leaf.shape[0] if leaf.ndim else 0
        if n == 0 or n % parts:
            low = n - n % parts
            sizes = [f"{size}" for size in (low, low + parts) if size > 0]
            wanted = f"batches whose size {sharers} can share evenly"
            got = f"{_name(path)!r} of shape {tuple(leaf.shape)}"
            do = (
                f"Use a multiple of {parts}, such as {' or '.join(sizes)}, or fill it "
                f'up and say in "where" which examples count.'
            )
            raise Refusal(message("batch", wanted, got, do))


def check_spans(batch: PyTree, mesh: Mesh) -> None:
    """Raises if a batch is on one process, and the mesh spans several processes."""
    if not mesh.is_multi_process:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        # A traced array, or a shape to compile for, is not on any device yet.
        shape = isinstance(leaf, Tracer | jax.ShapeDtypeStruct)
        if not shape and getattr(leaf, "is_fully_addressable", True):
            wanted = "a batch on the devices of all processes"
            got = f"{_name(path)!r}, which is this process' own"
            do = "Make it one with hintjax.sharding.from_process."
            raise Refusal(message("batch", wanted, got, do))


def check_rules(layout: Layout, params: PyTree) -> None:
    """Raises if a rule matches no parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    paths = [_name(path) for path, _ in leaves]
    for rule in layout.rules:
        if not any(re.search(rule, path) for path in paths):
            got = f"the rule {rule!r}, which matches no parameter"
            do = f"The nearest are {nearest(rule, paths)}."
            wanted = "rules that match a parameter's path"
            raise Refusal(message("layout", wanted, got, do))


def stored(layout: Layout, params: PyTree) -> PyTree:
    """The sharding with which each parameter is stored.

    Args:
        layout: mesh and rules.
        params: the parameters, or their shapes; rules match their paths.

    Returns:
        A tree of `NamedSharding`, of the same structure.

    Raises:
        ValueError: if the spec of a rule has more axes than an array, names an axis
            that the mesh does not have, or does not divide the array evenly; if a name
            in metadata is unknown.
    """

    def place(path, leaf):
        box, leaf = (leaf, leaf.value) if _is_box(leaf) else (None, leaf)
        spec = _spec(layout, _name(path), tuple(leaf.shape), box)
        sharding = NamedSharding(automatic(layout.mesh), spec)
        return sharding if box is None else box.replace_boxed(sharding)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=_is_box)


def whole(shardings: PyTree) -> PyTree:
    """The shardings inside a step: without the axes over which batches are sharded."""

    def gather(sharding):
        kept = [
            tuple(name for name in _names(entry) if name not in BATCH) or None
            for entry in sharding.spec
        ]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    return jax.tree.map(gather, shardings)


def alike(shardings: PyTree, params: PyTree, tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree that contains copies of parameters, such as Adam's moments.

    An array with the shape of a parameter, and a path that ends with the path of this
    parameter, gets the same sharding; all other arrays are replicated.
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
    """Places arrays that every process has on the devices of all processes.

    In one process this is `jax.device_put`.

    Args:
        tree: arrays; in several processes, the same in each, or already on a mesh.
        shardings: one sharding for all arrays, or a tree that is a prefix of `tree`.

    Returns:
        The same arrays, with these shardings.
    """
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(partial(_spread, sharding), part),
        shardings,
        tree,
    )


def _spread(sharding: jax.sharding.Sharding, leaf: Any) -> jax.Array:
    """Places one array as `spread` does."""
    if isinstance(leaf, Tracer):
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
    """Makes one batch of the whole mesh from the examples that each process has read.

    Args:
        batch: the examples of this process: B / `jax.process_count()` of a batch of B.
            Shapes may change only in all processes at once.
        mesh: the stage's.

    Returns:
        The batch as the stage expects it, sharded over `data` and `fsdp`.
    """
    mesh = mesh.mesh if isinstance(mesh, Layout) else mesh
    sharding = over_batch(mesh)
    # The number of parts of a batch that this process holds.
    ours = max(shares(mesh) * mesh.local_mesh.size // mesh.size, 1)
    check_even(batch, ours, f"the {ours} devices of a process")
    shapes = {
        _name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    known = (mesh, *shapes.items())
    if mesh.is_multi_process and known not in _AGREED:
        # Otherwise each process would compute with another batch, unnoticed.
        agree("shapes of their batches", shapes)
        _AGREED.add(known)
    return jax.tree.map(
        partial(jax.make_array_from_process_local_data, sharding), batch
    )


def place(variables: PyTree, mesh: Mesh | Layout) -> PyTree:
    """Places the variables of a teacher where a stage on this mesh expects them.

    `update` would copy a teacher that is elsewhere to all devices at every step.

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


def _spec(
    layout: Layout, path: str, shape: tuple[int, ...], box: nn.Partitioned | None
) -> PartitionSpec:
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


def _annotated(layout: Layout, path: str, box: nn.Partitioned) -> PartitionSpec:
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
    # None is the answer to no names; a box has names.
    return logical_to_mesh_axes(box.names, rules) or PartitionSpec()


def _is_box(node: Any) -> bool:
    """Whether a node is a parameter whose axes have names."""
    return isinstance(node, nn.Partitioned)


def _check_spec(
    caller: str, spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh
) -> None:
    """Raises unless a parameter of this shape can be sharded so."""
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


def _name(path: tuple[Any, ...]) -> str:
    """The path of an array as one string."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
