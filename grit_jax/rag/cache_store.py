"""Stores the KV caches of documents on disk, in floating point or in int8.

Legend of dimensions: N tokens of all documents, L layers, K key/value heads, H head dimension.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float, Int, Int8
import ml_dtypes
import numpy as np

from grit_jax.inference.cache_utils import cache_from_arrays
from grit_jax.models import KVCache

FORMATS = ("float32", "bfloat16", "int8")


def quantize(
    array: Float[np.ndarray, "N L K H"],
) -> tuple[Int8[np.ndarray, "N L K H"], Float[np.ndarray, "N L K 1"]]:
    """Rounds each vector of a head to int8, and returns the integers and their scales.

    The scale of a vector whose values are all below 4e-6 is 0: the vector becomes zeros.
    """
    values = array.astype(np.float32)
    scales = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    rounded = np.rint(values / np.where(scales, scales.astype(np.float32), 1))
    return np.clip(rounded, -127, 127).astype(np.int8), scales


def write_caches(folder: Path, caches: Sequence[KVCache], cache_format: str) -> None:
    """Writes the caches of documents into a folder.

    Args:
      folder: an existing folder.
      caches: caches of one row, without padding.
      cache_format: one of `FORMATS`.
    """
    starts = np.cumsum([0, *(cache.num_slots for cache in caches)])
    np.save(folder / "starts.npy", starts)
    for name in ("keys", "values"):
        # [L, 1, slots, K, H] -> [slots, L, K, H]: one document is one contiguous range.
        arrays = [np.moveaxis(np.asarray(getattr(cache, name))[:, 0], 0, 1) for cache in caches]
        array = np.concatenate(arrays)
        if cache_format == "int8":
            array, scales = quantize(array)
            np.save(folder / f"{name}_steps.npy", scales)
        elif cache_format == "bfloat16":  # The .npy format has no bfloat16.
            array = array.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            array = array.astype(np.float32)
        np.save(folder / f"{name}.npy", array)


def copy_caches(source: Path, indices: Int[np.ndarray, " documents"], folder: Path) -> None:
    """Copies the caches of some documents of a folder into another folder, as they are stored.

    Args:
      source: a folder written by `write_caches`.
      indices: indices of the documents in `source`, at least one.
      folder: an existing folder.
    """
    starts = np.load(source / "starts.npy")
    ranges = [slice(*starts[index : index + 2]) for index in indices]
    np.save(folder / "starts.npy", np.cumsum([0, *(each.stop - each.start for each in ranges)]))
    for name in ("keys", "values", "keys_steps", "values_steps"):
        path = source / f"{name}.npy"
        if path.exists():  # Only int8 has steps.
            stored = np.load(path, mmap_mode="r")
            np.save(folder / path.name, np.concatenate([stored[each] for each in ranges]))


def read_cache(folder: Path, index: int, dtype: str) -> KVCache:
    """Returns the cache of one document, without reading the others.

    Args:
      folder: a folder written by `write_caches`.
      index: index of the document in the folder.
      dtype: dtype of the keys and values to return.
    """
    start, end = np.load(folder / "starts.npy")[index : index + 2]

    def read(name: str) -> Float[np.ndarray, "L 1 slots K H"]:
        stored = np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[start:end])
        if stored.dtype == np.uint16:
            stored = stored.view(ml_dtypes.bfloat16)
        elif stored.dtype == np.int8:
            scales = np.load(folder / f"{name}_steps.npy", mmap_mode="r")[start:end]
            stored = stored * scales.astype(np.float32)
        return np.moveaxis(stored.astype(dtype), 1, 0)[:, None]

    return cache_from_arrays(read("keys"), read("values"))
