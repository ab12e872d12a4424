"""Caches and parameters as generation holds them.

Legend of dimensions: L layers, B rows, T slots, K key/value heads, H head dimension.
"""

from collections.abc import Sequence

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from grit_jax.models import Decoder, KVCache
from grit_jax.sharding import partition_spec


def join_caches(caches: Sequence[KVCache], num_rows: int, num_slots: int, taken: int) -> KVCache:
    """Returns one cache, in the host's memory, with a row for each of several.

    Args:
      caches: of one row each.
      num_rows: rows of the result; those beyond `caches` are empty.
      num_slots: slots of the result.
      taken: slots that count as taken, at least as many as any of the caches has.
    """
    L, _, _, K, H = caches[0].keys.shape
    keys = np.zeros((L, num_rows, num_slots, K, H), caches[0].keys.dtype)
    values, positions = np.zeros_like(keys), np.zeros((num_rows, num_slots), np.int32)
    segment_ids = np.zeros_like(positions)
    for row, cache in enumerate(caches):
        slots = slice(cache.num_slots)
        keys[:, row, slots], values[:, row, slots] = cache.keys[:, 0], cache.values[:, 0]
        positions[row, slots], segment_ids[row, slots] = cache.positions[0], cache.segment_ids[0]
    return KVCache(keys, values, positions, segment_ids, np.int32(taken))  # type: ignore


def cache_shardings(mesh: Mesh) -> KVCache:
    """Returns how a cache lies on a mesh, in the place of each of its arrays."""

    def sharding(*logical_axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(*logical_axes))

    slots, rows = sharding("layers", "batch", None, "kv_heads"), sharding("batch")
    whole = NamedSharding(mesh, PartitionSpec())
    return KVCache(slots, slots, rows, rows, whole)  # type: ignore


def unstack_layers(model: Decoder, mesh: Mesh) -> Decoder:
    """Returns the model with a module for each layer, on a single CPU device; elsewhere as it is.

    XLA for CPUs copies a layer's weights out of the stack before it multiplies, which is three
    times the memory traffic where a step is nothing but reading weights. Each layer's parameters
    are a view of the stack's memory.
    """
    device = mesh.devices.flat[0]
    if mesh.devices.size > 1 or device.platform != "cpu":
        return model
    graph, layers = nnx.split(model.layers)

    def layer(number: int) -> nnx.Module:
        views = jax.tree.map(
            lambda stack: jax.device_put(np.asarray(stack)[number], device), layers
        )
        return nnx.merge(graph, views)

    apart = nnx.merge(*nnx.split(model))
    apart.layers = nnx.List(layer(number) for number in range(model.config.num_hidden_layers))
    return apart
