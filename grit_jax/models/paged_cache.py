"""The paged key/value cache: rows share one pool of pages. For dimensions see `grit_jax.models`.

A page holds the keys and values of `page_size` consecutive tokens, in every layer. The page table
lists the pages of each row in the order of its tokens. Rows may have pages in common, as long as
no row writes to them.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from grit_jax.models.kv_cache import KVCache
from grit_jax.pytree import pytree_dataclass


@pytree_dataclass
class PagedCache:
    """Keys and values of earlier tokens, in pages. It replaces a `KVCache` in a call of the model.

    The position of a token is its index in the row, so a row has no padding between tokens.

    Attributes:
      keys: the keys of all pages, rotated by their positions.
      values: the values of all pages.
      page_table: the pages of each row; entries beyond `lengths` are arbitrary pages.
      lengths: number of tokens in each row.
      slots: page and offset in the page of each token of the current call; None between calls.
    """

    keys: Float[Array, "L pages page_size K H"]
    values: Float[Array, "L pages page_size K H"]
    page_table: Int[Array | np.ndarray, "B row_pages"]
    lengths: Int[Array | np.ndarray, " B"]
    slots: tuple[Int[Array, "B S"], Int[Array, "B S"]] | None = None

    @property
    def page_size(self) -> int:
        """Number of tokens in a page."""
        return self.keys.shape[2]

    @property
    def num_slots(self) -> int:
        """Number of tokens that the pages of a row hold."""
        return self.page_table.shape[1] * self.page_size

    @property
    def positions(self) -> Int[Array, "B T"]:
        """Position of each slot of a row."""
        return jnp.broadcast_to(jnp.arange(self.num_slots), (len(self.lengths), self.num_slots))

    @property
    def segment_ids(self) -> Int[Array, "B T"]:
        """1 for each slot of a row that holds a token, 0 for the others."""
        return (self.positions < jnp.asarray(self.lengths)[:, None]).astype(jnp.int32)

    def next_positions(self) -> Int[Array, " B"]:
        """Returns the position after the last token of each row."""
        return jnp.asarray(self.lengths)

    def reserve(
        self,
        positions: Int[Array | np.ndarray, "B S"],
        segment_ids: Int[Array | np.ndarray, "B S"],
    ) -> PagedCache:
        """Returns the cache with slots reserved for these tokens; padding gets no slot."""
        is_token = jnp.asarray(segment_ids) > 0
        pages = jnp.take_along_axis(
            jnp.asarray(self.page_table), positions // self.page_size, axis=1, mode="clip"
        )
        # Writes to pages that do not exist are dropped.
        pages = jnp.where(is_token, pages, self.keys.shape[1])
        return dataclasses.replace(
            self,
            lengths=self.lengths + jnp.sum(is_token, axis=1),
            slots=(pages, positions % self.page_size),
        )

    def write(
        self,
        layer: int | Int[Array, ""],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
    ) -> PagedCache:
        """Returns the cache with a layer's keys and values in the slots reserved last."""
        assert self.slots is not None
        index = (layer, *self.slots)
        return dataclasses.replace(
            self,
            keys=self.keys.at[index].set(key, mode="drop"),
            values=self.values.at[index].set(value, mode="drop"),
        )

    def layer_keys_and_values(
        self, layer: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Returns the keys and values of a layer, gathered from the pages of each row."""

        def gather(pages: Float[Array, "L pages page_size K H"]) -> Float[Array, "B T K H"]:
            rows = pages[layer, jnp.asarray(self.page_table)]  # [B, row_pages, page_size, K, H]
            return rows.reshape(len(rows), self.num_slots, *rows.shape[3:])

        return gather(self.keys), gather(self.values)


# What a call of the model takes as its cache.
Cache = KVCache | PagedCache
