"""Joins, splits and moves KV caches in host memory.

Legend of dimensions: L layers, B rows, T slots, K key/value heads, H head dimension.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float
import numpy as np

from grit_jax.models import KVCache
from grit_jax.sharding import partition_spec


def stack_caches(
    caches: Sequence[KVCache], num_rows: int, num_slots: int, num_used: int
) -> KVCache:
    """Returns one cache with a row for each of several caches.

    Args:
      caches: caches of one row each.
      num_rows: number of rows of the result; rows beyond `caches` are empty.
      num_slots: number of slots of the result.
      num_used: number of slots that count as used: at least as many as any of the caches has.
    """
    L, _, _, K, H = caches[0].keys.shape
    keys = np.zeros((L, num_rows, num_slots, K, H), caches[0].keys.dtype)
    values, positions = np.zeros_like(keys), np.zeros((num_rows, num_slots), np.int32)
    segment_ids = np.zeros_like(positions)
    for row, cache in enumerate(caches):
        slots = slice(cache.num_slots)
        keys[:, row, slots], values[:, row, slots] = cache.keys[:, 0], cache.values[:, 0]
        positions[row, slots], segment_ids[row, slots] = cache.positions[0], cache.segment_ids[0]
    return _host_cache(keys, values, positions, segment_ids, num_used)


def concat_caches(
    caches: Sequence[KVCache],
    frequencies: Float[np.ndarray, "L half"],
    *,
    continue_positions: bool,
) -> KVCache:
    """Returns the cache of several texts, one after the other, in one row.

    Args:
      caches: caches of one row without padding, each with positions from 0 on.
      frequencies: the model's rotary frequencies (`ModelConfig.layer_rotary_frequencies`).
      continue_positions: whether to rotate the keys of each cache to the positions that follow the
        previous cache. If not, the keys keep their positions from 0 on, as in the original; tokens
        after the caches have the same positions in both cases.
    """
    starts = np.cumsum([0, *(cache.num_slots for cache in caches)])
    keys = [
        rotate_keys(np.asarray(cache.keys), int(start) if continue_positions else 0, frequencies)
        for cache, start in zip(caches, starts, strict=False)
    ]
    values = np.concatenate([np.asarray(cache.values) for cache in caches], axis=2)
    slots = np.arange(starts[-1], dtype=np.int32)[None]
    return _host_cache(np.concatenate(keys, axis=2), values, slots, np.ones_like(slots), starts[-1])


def rotate_keys(
    keys: Float[np.ndarray, "L B T K H"], shift: int, frequencies: Float[np.ndarray, "L half"]
) -> Float[np.ndarray, "L B T K H"]:
    """Returns rotary keys moved to positions that are `shift` larger: rotations add up."""
    if shift == 0:
        return keys
    angles = shift * frequencies.astype(np.float64)[:, None, None, None]
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(keys.astype(np.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return np.concatenate(rotated, axis=-1).astype(keys.dtype)


def copy_row(cache: KVCache, row: int, length: int) -> KVCache:
    """Returns a copy of the first `length` slots of one row of a cache in host memory."""
    return _host_cache(
        np.copy(cache.keys[:, row : row + 1, :length]),
        np.copy(cache.values[:, row : row + 1, :length]),
        np.copy(cache.positions[row : row + 1, :length]),
        np.copy(cache.segment_ids[row : row + 1, :length]),
        length,
    )


def cache_from_arrays(
    keys: Float[Array | np.ndarray, "L 1 T K H"], values: Float[Array | np.ndarray, "L 1 T K H"]
) -> KVCache:
    """Returns the cache of one text of T tokens, all of them in one segment."""
    slots = np.arange(keys.shape[2], dtype=np.int32)[None]
    return _host_cache(keys, values, slots, np.ones_like(slots), keys.shape[2])


def place_cache(cache: KVCache, mesh: Mesh) -> KVCache:
    """Returns a cache on the devices of a mesh, its rows and heads sharded."""

    def place(array: Any, *logical_axes: str | None) -> Array:
        return jax.device_put(array, NamedSharding(mesh, partition_spec(*logical_axes)))

    return KVCache(
        keys=place(cache.keys, "layers", "batch", None, "kv_heads"),
        values=place(cache.values, "layers", "batch", None, "kv_heads"),
        positions=place(cache.positions, "batch"),
        segment_ids=place(cache.segment_ids, "batch"),
        length=place(cache.length),
    )


def _host_cache(keys: Any, values: Any, positions: Any, segment_ids: Any, length: Any) -> KVCache:
    return KVCache(keys, values, positions, segment_ids, np.int32(length))  # type: ignore
