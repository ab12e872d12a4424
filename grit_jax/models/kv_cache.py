"""The key/value cache. For dimensions see `grit_jax.models`."""

from __future__ import annotations

import dataclasses

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from grit_jax.pytree import pytree_dataclass


@pytree_dataclass
class KVCache:
    """Keys and values of earlier tokens, in a fixed number of slots.

    Each call of the model fills as many slots as its rows have positions, the same number in every
    row. Padding fills slots too, and no token attends to it.

    Attributes:
      keys: keys, rotated by their positions.
      values: values.
      positions: position of each slot's token in its text.
      segment_ids: ID of the text that a slot's token belongs to; 0 for padding or an empty slot.
      length: number of slots in use.
    """

    keys: Float[Array | np.ndarray, "L B T K H"]
    values: Float[Array | np.ndarray, "L B T K H"]
    positions: Int[Array | np.ndarray, "B T"]
    segment_ids: Int[Array | np.ndarray, "B T"]
    length: Int[Array | np.ndarray | np.integer, ""]

    @property
    def num_slots(self) -> int:
        """Number of slots in a row, used or not."""
        return self.segment_ids.shape[1]

    def next_positions(self) -> Int[Array, " B"]:
        """Returns the position after the last token of each row."""
        return jnp.max(jnp.where(self.segment_ids > 0, self.positions + 1, 0), axis=1)

    def reserve(
        self,
        positions: Int[Array | np.ndarray, "B S"],
        segment_ids: Int[Array | np.ndarray, "B S"],
    ) -> KVCache:
        """Returns the cache with its next S slots reserved for these tokens.

        Raises:
          ValueError: there are too few slots. Not detected in a jitted function, where `length` is
            not known.
        """
        num_tokens = segment_ids.shape[1]
        used = 0 if isinstance(self.length, Tracer) else int(self.length)
        if used + num_tokens > self.num_slots:
            raise ValueError(
                f"a cache of {self.num_slots} slots, {used} of them in use, "
                f"has no room for rows of {num_tokens} tokens"
            )
        start = (0, self.length)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(
                self.positions, jnp.asarray(positions, self.positions.dtype), start
            ),
            segment_ids=jax.lax.dynamic_update_slice(
                self.segment_ids, jnp.asarray(segment_ids, self.segment_ids.dtype), start
            ),
            length=self.length + num_tokens,
        )

    def write(
        self,
        layer: int | Int[Array, ""],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
    ) -> KVCache:
        """Returns the cache with a layer's keys and values in the slots reserved last."""
        start = (layer, 0, self.length - key.shape[1], 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, key[None], start),
            values=jax.lax.dynamic_update_slice(self.values, value[None], start),
        )

    def layer_keys_and_values(
        self, layer: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Returns the keys and values of a layer."""
        return jnp.asarray(self.keys)[layer], jnp.asarray(self.values)[layer]
