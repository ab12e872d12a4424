"""The device mesh, and the table that maps logical axes to mesh axes.

Arrays have logical axes, named by what they hold ("embed", "heads", "batch"). All shardings follow
from `LOGICAL_AXIS_RULES`; no other module names a mesh axis in a sharding.
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

# Logical axis -> mesh axes, with the reason for each.
LOGICAL_AXIS_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # Rows of texts are split over every axis that does not split the computation of a layer.
    "batch": ("slice", "fsdp", "expert"),
    # Fully sharded data parallelism splits each weight along its model dimension. Slices are
    # connected by a slow network, so each slice has all weights.
    "embed": "fsdp",
    # Megatron-style tensor parallelism: heads, feed-forward columns and vocabulary.
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    # Too small to be worth a collective, or scanned over.
    "head_dim": None,
    "norm": None,
    "embedding": None,
    "embedding_hidden": None,
    "layers": None,
    "router": None,
    "lora": None,
    None: None,
}


class MeshError(ValueError):
    """The mesh does not fit the devices, or the model does not fit the mesh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices per mesh axis. One size may be -1, for the devices that the others leave.

    Attributes:
      slice: number of TPU slices, joined by the data center network. Each has all weights, and a
        share of the batch.
      fsdp: number of shards of the batch and the weights (fully sharded data parallelism).
      tensor: number of shards of heads, feed-forward columns and the vocabulary (tensor
        parallelism).
      expert: number of shards of the batch and of Mixtral's experts (expert parallelism).
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
      slice: number of TPU slices; one size may be -1, for the devices that the others leave.
      fsdp: ways in which the batch and the weights are split.
      tensor: ways in which heads, feed-forward columns and the vocabulary are split.
      expert: ways in which the batch and Mixtral's experts are split.
      devices: the devices of the mesh, by default all of them.

    Raises:
      MeshError: the product of the sizes is not the number of devices, or `slice` is not a multiple
        of the number of TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _resolve_sizes(
        {"slice": slice, "fsdp": fsdp, "tensor": tensor, "expert": expert}, devices
    )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if num_slices == 1:
        # Eight shards of experts on 4 x 4 x 4 chips split a physical axis.
        device_array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(device_array, MESH_AXES, axis_types=axis_types)
    if sizes[0] % num_slices:
        raise MeshError(
            f"config.mesh.slice={sizes[0]} must be a multiple of the {num_slices} slices that the "
            "devices are in: only data parallelism crosses the slow network between slices"
        )
    within_slice, between_slices = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1, 1)
    device_array = mesh_utils.create_hybrid_device_mesh(
        within_slice, between_slices, devices, allow_split_physical_axes=True
    )
    return Mesh(device_array, MESH_AXES, axis_types=axis_types)


def _resolve_sizes(sizes: dict[str, int], devices: Sequence[jax.Device]) -> tuple[int, ...]:
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
      sizes: logical axis and size of each field, by its name (`ModelConfig.sharded_sizes`).
      mesh: the mesh.

    Raises:
      MeshError: the mesh does not divide a size; the message names the fields of both.
    """
    for field, (logical_axis, size) in sizes.items():
        if size % shards(mesh, logical_axis):
            (axis,) = mesh_axes(logical_axis)
            raise MeshError(
                f"config.mesh.{axis}={mesh.shape[axis]} does not divide {field}={size}: choose "
                "other sizes of the mesh, or fewer devices"
            )


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes."""
    return PartitionSpec(*(LOGICAL_AXIS_RULES[axis] for axis in logical_axes))


def mesh_axes(logical_axis: str | None) -> tuple[str, ...]:
    """Returns the mesh axes that split a logical axis, outermost first."""
    axes = LOGICAL_AXIS_RULES[logical_axis] or ()
    return (axes,) if isinstance(axes, str) else axes


def shards(mesh: Mesh | AbstractMesh, logical_axis: str) -> int:
    """Returns the number of shards of a logical axis on `mesh`."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_axis))


def current_shards(logical_axis: str) -> int:
    """Returns the number of shards of a logical axis on the current mesh, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else shards(mesh, logical_axis)


def all_gather_fsdp(weight: jax.Array, axis: int) -> jax.Array:
    """All-gathers a weight along "embed", inside a `shard_map` over the axes of "batch".

    Its gradient is reduce-scattered once, at this call.

    Args:
      weight: this device's shard.
      axis: index of its axis "embed".
    """
    # XLA crashes on CPUs if it reduces bfloat16 here, as the gradient does.
    dtype = jnp.float32 if platform() == "cpu" else weight.dtype
    gathered = jax.lax.all_gather(weight.astype(dtype), mesh_axes("embed"), axis=axis, tiled=True)
    same_along = tuple(axis for axis in mesh_axes("batch") if axis not in mesh_axes("embed"))
    return jax.lax.pcast(gathered, same_along, to="varying").astype(weight.dtype)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of the rows of texts on `mesh`."""
    return shards(mesh, "batch")


def shard_rows(arrays: Any, mesh: Mesh) -> Any:
    """Returns a tree of arrays on the devices of `mesh`, with the rows split over data shards."""
    return jax.device_put(arrays, NamedSharding(mesh, partition_spec("batch")))


def local_shards(mesh: Mesh) -> list[int]:
    """Returns the indices of the row shards that this process's devices hold."""
    count = batch_shards(mesh)
    sharding = NamedSharding(mesh, partition_spec("batch"))
    held = sharding.addressable_devices_indices_map((count,)).values()
    return sorted({index[0].indices(count)[0] for index in held if index is not None})


def platform() -> str:
    """Returns the platform to compile for: the current mesh's, else the default device's.

    They differ when a program is compiled for devices that are not attached.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def with_logical_constraint(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains the sharding of `array` on the current mesh; does nothing without a mesh.

    Left alone, XLA may split activations along the model dimension, as the weights are, and gather
    activations instead of the much smaller weights.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(*logical_axes))


def microbatch(rows: jax.Array, num_parts: int) -> jax.Array:
    """Splits rows [B, ...] into microbatches [parts, B / parts, ...].

    Part p has the rows p, p + parts, ..., an equal share of every device's rows, so that no row
    moves between devices. B must be a multiple of the number of parts times the data shards.
    """
    assert rows.shape[0] % num_parts == 0, "rows are a multiple of the number of parts"
    parts = jnp.moveaxis(rows.reshape(-1, num_parts, *rows.shape[1:]), 1, 0)
    return with_logical_constraint(parts, None, "batch", *(None,) * (rows.ndim - 1))


def variable_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each variable of an NNX state.

    Args:
      state: an NNX state, abstract or not, whose variables have `out_sharding` metadata.
      mesh: a mesh with the axes `MESH_AXES`.

    Returns:
      A tree of the same structure with a `NamedSharding` instead of each array.
    """

    def sharding(variable: nnx.Variable) -> nnx.Variable:
        spec = partition_spec(*variable.get_metadata()["out_sharding"])
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(sharding, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
