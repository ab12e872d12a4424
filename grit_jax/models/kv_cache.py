"""Keys and values of tokens that were read before.

Legend of dimensions: L layers, B rows, S new positions, T slots, K key/value heads,
H head dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Slots of fixed number, in which every call leaves the keys and values of its tokens.

    A call takes as many slots as its rows are long, the same in every row; the padding of a shorter
    row takes slots too, and no token ever sees them.

    Attributes:
      keys: keys, rotated by their positions.
      values: values.
      positions: position of each slot's token in its text.
      segment_ids: which text of its row a slot's token belongs to; 0 is padding, or not yet used.
      length: number of slots taken.
    """

    keys: Float[Array, "L B T K H"]
    values: Float[Array, "L B T K H"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    length: Int[Array, ""]

    @property
    def num_slots(self) -> int:
        """Number of slots in a row, taken or not."""
        return self.segment_ids.shape[1]

    def next_positions(self) -> Int[Array, " B"]:
        """Returns the position that follows the last token of each row."""
        return jnp.max(jnp.where(self.segment_ids > 0, self.positions + 1, 0), axis=1)

    def reserve(self, positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"]) -> KVCache:
        """Returns the cache with its next slots given to tokens whose keys are still to come.

        Raises:
          ValueError: there are too few slots, as far as that is known: in a jitted function
            `length` is not.
        """
        num_tokens = segment_ids.shape[1]
        taken = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if taken + num_tokens > self.num_slots:
            raise ValueError(
                f"a cache of {self.num_slots} slots, {taken} of them taken, "
                f"has no room for rows of {num_tokens} tokens"
            )
        start = (0, self.length)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice(
                self.positions, positions.astype(self.positions.dtype), start
            ),
            segment_ids=jax.lax.dynamic_update_slice(
                self.segment_ids, segment_ids.astype(self.segment_ids.dtype), start
            ),
            length=self.length + num_tokens,
        )

    def write(
        self, layer: Int[Array, ""], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"]
    ) -> KVCache:
        """Returns the cache with a layer's keys and values in the slots taken last."""
        start = (layer, 0, self.length - key.shape[1], 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, key[None], start),
            values=jax.lax.dynamic_update_slice(self.values, value[None], start),
        )

    def layer_keys_and_values(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Returns the keys and values of a layer."""
        return self.keys[layer], self.values[layer]
