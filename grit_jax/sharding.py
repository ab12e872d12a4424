"""The mesh of devices, and the one table that says how every array lies on it.

Arrays name their axes by what they hold ("embed", "heads", "batch"); the table below maps those
names to mesh axes. Nothing else in the project names a mesh axis in a sharding.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slice", "fsdp", "tensor", "expert")

# Logical axis -> mesh axes, each with its reason.
LOGICAL_AXIS_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # Rows of texts: every axis that does not split a layer's mathematics carries data.
    "batch": ("slice", "fsdp", "expert"),
    # Fully sharded data parallelism splits each weight along its model dimension; slices are
    # joined by the slow network, so weights are whole within each slice.
    "embed": "fsdp",
    # Megatron-style tensor parallelism: heads, feed-forward columns and vocabulary.
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    # Too small to be worth a collective, or walked over one at a time.
    "head_dim": None,
    "norm": None,
    "embedding": None,
    "layers": None,
    "router": None,
    "lora": None,
    None: None,
}


class MeshError(ValueError):
    """The mesh asked for cannot be laid over the devices at hand, or the model over the mesh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices per mesh axis. One size may be -1, for the devices that the others leave.

    Attributes:
      slice: number of TPU slices, joined by the data center network. Each has all weights, and a
        share of the batch.
      fsdp: ways in which the batch and the weights are split (fully sharded data parallelism).
      tensor: ways in which heads, feed-forward columns and the vocabulary are split (tensor
        parallelism).
      expert: ways in which the batch and Mixtral's experts are split (expert parallelism).
    """

    slice: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1


def make_mesh(
    slice: int = MeshShape.slice,  # noqa: A002  the axis is called so in every configuration
    fsdp: int = MeshShape.fsdp,
    tensor: int = MeshShape.tensor,
    expert: int = MeshShape.expert,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh over all devices, with the axes `MESH_AXES`.

    Args:
      slice, fsdp, tensor, expert: see `MeshShape`.
      devices: the devices to use, by default all of them.

    One size may be -1: what the others leave. Where the devices lie in several slices of TPUs,
    the axis "slice" is those.

    Raises:
      MeshError: the sizes do not multiply to the number of devices, or cut through a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _complete({"slice": slice, "fsdp": fsdp, "tensor": tensor, "expert": expert}, devices)
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if num_slices == 1:
        # Eight experts on a block of 4 x 4 x 4 chips split one of its sides.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=axis_types)
    if sizes[0] % num_slices:
        raise MeshError(
            f"config.mesh.slice={sizes[0]}, but the devices lie in {num_slices} slices: only data "
            "parallelism crosses the slow network between them"
        )
    within, between = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1, 1)
    placed = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, MESH_AXES, axis_types=axis_types)


def _complete(sizes: dict[str, int], devices: Sequence[jax.Device]) -> tuple[int, ...]:
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [axis for axis, size in sizes.items() if size == 0 or size < -1]
    if len(free) > 1 or wrong:
        raise MeshError(f"config.mesh: {asked}: sizes must be positive, and at most one may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (not free and known != len(devices)):
        raise MeshError(
            f"config.mesh: {asked} needs "
            f"{'a multiple of ' if free else ''}{known} devices, but there are {len(devices)}"
        )
    return tuple(len(devices) // known if size == -1 else size for size in sizes.values())


def check_sizes_fit_mesh(sizes: Mapping[str, tuple[str, int]], mesh: Mesh) -> None:
    """Checks that the mesh divides the sizes of a model.

    Args:
      sizes: logical axis and size of each field (`ModelConfig.sharded_sizes`).
      mesh: the mesh.

    Raises:
      MeshError: it does not; the message names the field of the model and that of the mesh.
    """
    for field, (logical_axis, size) in sizes.items():
        if size % shards(mesh, logical_axis):
            (axis,) = mesh_axes(logical_axis)
            raise MeshError(
                f"config.mesh.{axis}={mesh.shape[axis]} does not divide config.model "
                f"{field}={size}: choose other sizes of the mesh, or fewer devices"
            )


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """Returns the partition of an array whose axes have these names, by `LOGICAL_AXIS_RULES`."""
    return PartitionSpec(*(LOGICAL_AXIS_RULES[axis] for axis in logical_axes))


def mesh_axes(logical_axis: str | None) -> tuple[str, ...]:
    """Returns the mesh axes that split an axis of this name, outermost first."""
    axes = LOGICAL_AXIS_RULES[logical_axis] or ()
    return (axes,) if isinstance(axes, str) else axes


def shards(mesh: Mesh | AbstractMesh, logical_axis: str) -> int:
    """Returns the number of ways in which an axis of this name is split over `mesh`."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_axis))


def current_shards(logical_axis: str) -> int:
    """Returns the number of ways in which an axis of this name is split over the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else shards(mesh, logical_axis)


def all_gather_fsdp(weight: jax.Array, axis: int) -> jax.Array:
    """Returns a weight whole along "embed", inside a `shard_map` over the axes of "batch".

    Each device may then do something else with it. Its gradient is summed and split up once, where
    this is called.

    Args:
      weight: the device's part.
      axis: the number of its axis "embed".
    """
    # XLA for CPUs ends the process where it is to sum up bfloat16 here, as the gradient does.
    dtype = jnp.float32 if platform() == "cpu" else weight.dtype
    gathered = jax.lax.all_gather(weight.astype(dtype), mesh_axes("embed"), axis=axis, tiled=True)
    same_along = tuple(axis for axis in mesh_axes("batch") if axis not in mesh_axes("embed"))
    return jax.lax.pcast(gathered, same_along, to="varying").astype(weight.dtype)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of ways in which rows of texts are split over `mesh`."""
    return shards(mesh, "batch")


def local_shards(mesh: Mesh) -> list[int]:
    """Returns the numbers of the shards of rows of texts that this process's devices hold."""
    count = batch_shards(mesh)
    sharding = NamedSharding(mesh, partition_spec("batch"))
    held = sharding.addressable_devices_indices_map((count,)).values()
    return sorted({index[0].indices(count)[0] for index in held if index is not None})


def platform() -> str:
    """Returns what the computation is for: that of the mesh in use, else of the default device.

    They differ where a program is compiled for devices that are not at hand.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def with_logical_constraint(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Lays `array` on the mesh in use as `LOGICAL_AXIS_RULES` says; without a mesh it does nothing.

    Left alone, the compiler may prefer to split activations along the model dimension, as the
    weights are, and to gather the activations in place of the much smaller weights.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(*logical_axes))


def microbatch(rows: jax.Array, num_parts: int) -> jax.Array:
    """Returns rows [B, ...] as [parts, B / parts, ...].

    Part p takes the rows p, p + parts, ...: an equal share of those of every device, so that no
    row travels. B is a multiple of the number of parts times that of the data shards.
    """
    assert rows.shape[0] % num_parts == 0, "rows are a multiple of the number of parts"
    parts = jnp.moveaxis(rows.reshape(-1, num_parts, *rows.shape[1:]), 1, 0)
    return with_logical_constraint(parts, None, "batch", *(None,) * (rows.ndim - 1))


def variable_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each variable of an NNX state, from the axis names it carries.

    Args:
      state: an NNX state, abstract or not, whose variables carry `out_sharding`.
      mesh: a mesh with the axes `MESH_AXES`.

    Returns:
      A tree of the same structure with a `NamedSharding` in the place of each array.
    """

    def sharding(variable: nnx.Variable) -> nnx.Variable:
        spec = partition_spec(*variable.get_metadata()["out_sharding"])
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
