"""Keys and values of documents on disk, as they are or in eight bits.

Legend of dimensions: N tokens of all documents, L layers, K key/value heads, H head dimension.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float, Int8
import ml_dtypes
import numpy as np

from grit_jax.models import KVCache

FORMATS = ("float32", "bfloat16", "int8")


def quantize(
    array: Float[np.ndarray, "N L K H"],
) -> tuple[Int8[np.ndarray, "N L K H"], Float[np.ndarray, "N L K 1"]]:
    """Returns the nearest of 255 even steps to each number, and for each head's vector the step.

    A vector of numbers below 4e-6 has the step 0, and becomes zeros.
    """
    wide = array.astype(np.float32)
    steps = (np.abs(wide).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    rounded = np.rint(wide / np.where(steps, steps.astype(np.float32), 1))
    return np.clip(rounded, -127, 127).astype(np.int8), steps


def write_caches(folder: Path, caches: Sequence[KVCache], form: str) -> None:
    """Writes the caches of some documents, of one row each, into a folder.

    Args:
      folder: is there.
      caches: each without padding.
      form: one of `FORMATS`.
    """
    starts = np.cumsum([0, *(cache.num_slots for cache in caches)])
    np.save(folder / "starts.npy", starts)
    for name in ("keys", "values"):
        # [L, 1, slots, K, H] -> [slots, L, K, H]: what a document has lies together.
        parts = [np.moveaxis(np.asarray(getattr(cache, name))[:, 0], 0, 1) for cache in caches]
        whole = np.concatenate(parts)
        if form == "int8":
            whole, steps = quantize(whole)
            np.save(folder / f"{name}_steps.npy", steps)
        elif form == "bfloat16":  # NumPy's files do not know it.
            whole = whole.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            whole = whole.astype(np.float32)
        np.save(folder / f"{name}.npy", whole)


def read_cache(folder: Path, number: int, dtype: str) -> KVCache:
    """Returns the cache of a document, of which no other is read.

    Args:
      folder: what `write_caches` wrote.
      number: of the document in it.
      dtype: of the result.
    """
    start, end = np.load(folder / "starts.npy")[number : number + 2]

    def read(name: str) -> np.ndarray:
        stored = np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[start:end])
        if stored.dtype == np.uint16:
            stored = stored.view(ml_dtypes.bfloat16)
        elif stored.dtype == np.int8:
            steps = np.load(folder / f"{name}_steps.npy", mmap_mode="r")[start:end]
            stored = stored * steps.astype(np.float32)
        return np.moveaxis(stored.astype(dtype), 1, 0)[:, None]  # [L, 1, slots, K, H]

    slots = np.arange(end - start, dtype=np.int32)[None]
    return KVCache(read("keys"), read("values"), slots, np.ones_like(slots), np.int32(end - start))  # type: ignore
