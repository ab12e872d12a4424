"""The programs of the engine: one reads a chunk of prompts, one generates tokens.

All that a program needs of a request is in its arguments, so a result does not depend on the row or
on the other rows. The shapes are few: a number of rows from `row_counts`, a number of pages of a
row that is a power of two, and with or without sampling.

Legend of dimensions: B rows, S positions, T slots of a row, D hidden, V vocabulary, E end tokens, L
layers, K key/value heads, H head dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32
import numpy as np

from grit_jax.arithmetic import ceil_div
from grit_jax.inference.compilation_notice import CompilationNotice
from grit_jax.inference.generate import NOT_FINITE
from grit_jax.inference.loading import unstack_layers
from grit_jax.inference.sampling import RowSampling, choose_tokens_by_row
from grit_jax.models import Decoder, PagedCache
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import partition_spec, shard_rows

# Maximum tokens of each row that one call generates.
MAX_STEPS = 16
# Stands for the token of a row that has ended.
NO_TOKEN = -2
# The page table has this many tokens in a row, or this times a power of two.
SMALLEST_ROW = 256
# Pages that one call loads.
PAGES_PER_LOAD = 8


@pytree_dataclass
class Rows:
    """The requests that the rows of a call belong to. A row without a request has zeros.

    Attributes:
      page_table: the pages of each row.
      lengths: number of tokens whose keys and values are in the pages.
      history: the tokens that a repetition penalty applies to; -1 for none.
      seeds: seed of each request.
      indices: index of each request's prompt, from which its random key is derived with the seed.
      num_new: number of tokens generated so far.
      max_new_tokens: maximum number of generated tokens.
      sampling: how tokens are chosen; None if all rows decode greedily without a penalty.
    """

    page_table: Int[Array | np.ndarray, "B row_pages"]
    lengths: Int[Array | np.ndarray, " B"]
    history: Int[Array | np.ndarray, "B T"]
    seeds: UInt32[Array | np.ndarray, " B"]
    indices: UInt32[Array | np.ndarray, " B"]
    num_new: Int[Array | np.ndarray, " B"]
    max_new_tokens: Int[Array | np.ndarray, " B"]
    sampling: RowSampling | None


class PagedPrograms:
    """The compiled programs, and the pages that they update.

    Args:
      model: model with its parameters on the mesh.
      mesh: the devices over which rows and heads are split.
      end_tokens: tokens that end a result.
      num_pages: number of pages.
      page_size: number of tokens in a page.
    """

    def __init__(self, model: Decoder, mesh: Mesh, end_tokens: Any, num_pages: int, page_size: int):
        self._graph, self._parameters = nnx.split(unstack_layers(model, mesh))
        self._mesh, self._end_tokens = mesh, np.array(end_tokens, np.int32)
        self._notice = CompilationNotice()
        pages = NamedSharding(mesh, partition_spec("layers", None, None, "kv_heads", "head_dim"))
        tokens = NamedSharding(mesh, PartitionSpec())
        compiled = functools.partial(jax.jit, donate_argnums=(0, 1))
        self._read = compiled(self._read_chunk, out_shardings=(pages, pages, tokens))
        self._decode = compiled(self._decode_tokens, out_shardings=(pages, pages, tokens))
        self._load = compiled(_load_pages, out_shardings=(pages, pages))

        def make_pages() -> tuple[Array, Array]:
            cache = model.make_pages(num_pages, page_size)
            return cache.keys, cache.values

        self._make_pages = jax.jit(make_pages, out_shardings=(pages, pages))
        self.clear()

    def clear(self) -> None:
        """Empties all pages."""
        with jax.set_mesh(self._mesh):
            self._keys, self._values = self._make_pages()

    def read(
        self, rows: Rows, tokens: Int[np.ndarray, "B S"], num_tokens: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, " B"]:
        """Adds tokens to the pages of each row, and returns the token that follows the last one.

        Args:
          rows: the requests.
          tokens: the next tokens of each row, right-padded.
          num_tokens: number of tokens of each row.
        """
        placed = shard_rows((rows, tokens, num_tokens), self._mesh)
        B, S = tokens.shape
        purpose = f"reads prompts of {B} x {S} tokens"
        with jax.set_mesh(self._mesh), self._announced(purpose, rows):
            self._keys, self._values, chosen = self._read(
                self._keys, self._values, self._parameters, *placed
            )
        return np.asarray(chosen)

    def decode(
        self, rows: Rows, tokens: Int[np.ndarray, " B"], steps: int
    ) -> Int[np.ndarray, "B steps"]:
        """Returns the next tokens of each row, `NO_TOKEN` after its end.

        Args:
          rows: the requests.
          tokens: the last token of each row, which is added to its pages.
          steps: maximum number of new tokens, up to `MAX_STEPS`.
        """
        placed = shard_rows((rows, tokens), self._mesh)
        B, T = rows.history.shape
        purpose = f"generates after {B} x {T} tokens"
        with jax.set_mesh(self._mesh), self._announced(purpose, rows):
            self._keys, self._values, generated = self._decode(
                self._keys,
                self._values,
                self._parameters,
                *placed,
                np.int32(steps),
                self._end_tokens,
            )
        return np.asarray(generated)[:, :steps]

    def load(
        self,
        pages: list[int],
        keys: Float[np.ndarray, "L T K H"] | None = None,
        values: Float[np.ndarray, "L T K H"] | None = None,
    ) -> None:
        """Writes ready-made keys and values to pages, or zeros.

        Args:
          pages: the pages.
          keys: the keys; the last page may be incomplete. None for zeros.
          values: the values.
        """
        L, num_pages, page_size, K, H = self._keys.shape
        for first in range(0, len(pages), PAGES_PER_LOAD):
            chosen = pages[first : first + PAGES_PER_LOAD]
            indices = np.full(PAGES_PER_LOAD, num_pages, np.int32)  # Others are not written.
            indices[: len(chosen)] = chosen
            slots = slice(first * page_size, (first + PAGES_PER_LOAD) * page_size)

            loaded = []
            for array in (keys, values):
                padded = np.zeros((L, PAGES_PER_LOAD * page_size, K, H), self._keys.dtype)
                if array is not None:
                    part = array[:, slots]
                    padded[:, : part.shape[1]] = part
                loaded.append(padded.reshape(L, PAGES_PER_LOAD, page_size, K, H))
            with jax.set_mesh(self._mesh):
                self._keys, self._values = self._load(self._keys, self._values, indices, *loaded)

    def _announced(self, purpose: str, rows: Rows) -> contextlib.AbstractContextManager[None]:
        return self._notice.around(purpose, rows.page_table.shape, rows.sampling is None)

    def _read_chunk(
        self,
        keys: Float[Array, "L pages page_size K H"],
        values: Float[Array, "L pages page_size K H"],
        parameters: Any,
        rows: Rows,
        tokens: Int[Array, "B S"],
        num_tokens: Int[Array, " B"],
    ) -> tuple[Array, Array, Int[Array, " B"]]:
        model = nnx.merge(self._graph, parameters)
        is_token = jnp.arange(tokens.shape[1]) < num_tokens[:, None]
        cache = PagedCache(keys, values, rows.page_table, rows.lengths)
        hidden, cache = model(tokens, segment_ids=is_token.astype(jnp.int32), cache=cache)
        last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, last, axis=1)
        seen = seen_tokens(rows, model.config.vocab_size)
        chosen = next_tokens(model, hidden, rows, jnp.asarray(rows.num_new), seen)
        return cache.keys, cache.values, chosen

    def _decode_tokens(
        self,
        keys: Float[Array, "L pages page_size K H"],
        values: Float[Array, "L pages page_size K H"],
        parameters: Any,
        rows: Rows,
        tokens: Int[Array, " B"],
        steps: Int[Array, ""],
        end_tokens: Int[Array, " E"],
    ) -> tuple[Array, Array, Int[Array, "B steps"]]:
        model = nnx.merge(self._graph, parameters)
        B = len(tokens)
        state = _DecodingState(
            cache=PagedCache(keys, values, rows.page_table, rows.lengths),
            tokens=tokens,
            num_new=jnp.asarray(rows.num_new),
            is_done=jnp.asarray(rows.num_new >= rows.max_new_tokens),
            seen=seen_tokens(rows, model.config.vocab_size),
            generated=jnp.full((B, MAX_STEPS), NO_TOKEN, jnp.int32),
            step=jnp.int32(0),
        )

        def generate_token(state: _DecodingState) -> _DecodingState:
            is_active = (~state.is_done).astype(jnp.int32)
            hidden, cache = model(
                state.tokens[:, None], segment_ids=is_active[:, None], cache=state.cache
            )
            chosen = next_tokens(model, hidden, rows, state.num_new, state.seen)
            num_new = state.num_new + is_active
            is_last = jnp.any(chosen[:, None] == end_tokens, axis=1) | (chosen == NOT_FINITE)
            chosen = jnp.where(state.is_done, NO_TOKEN, chosen)
            return _DecodingState(
                cache=dataclasses.replace(cache, slots=None),
                tokens=jnp.maximum(chosen, 0),
                num_new=num_new,
                is_done=state.is_done | is_last | (num_new >= rows.max_new_tokens),
                seen=add_seen(state.seen, chosen),
                generated=state.generated.at[:, state.step].set(chosen),
                step=state.step + 1,
            )

        def is_unfinished(state: _DecodingState) -> Bool[Array, ""]:
            return (state.step < steps) & ~jnp.all(state.is_done)

        state = jax.lax.while_loop(is_unfinished, generate_token, state)
        return state.cache.keys, state.cache.values, state.generated


@pytree_dataclass
class _DecodingState:
    cache: PagedCache
    tokens: Int[Array, " B"]
    num_new: Int[Array, " B"]
    is_done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    generated: Int[Array, "B steps"]
    step: Int[Array, ""]


def next_tokens(
    model: Decoder,
    hidden: Float[Array, "B 1 D"],
    rows: Rows,
    num_new: Int[Array, " B"],
    seen: Bool[Array, "B V"] | None,
) -> Int[Array, " B"]:
    """Returns the token that follows each row, `NOT_FINITE` if its logits are not.

    The random key depends on the seed, the prompt's index and the number of new tokens alone.
    """
    logits = model.logits(hidden)[:, 0]

    def key(seed: Array, index: Array, count: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), count)

    if rows.sampling is None or seen is None:
        chosen = jnp.argmax(logits.astype(jnp.float32), axis=1).astype(jnp.int32)
    else:
        keys = jax.vmap(key)(jnp.asarray(rows.seeds), jnp.asarray(rows.indices), num_new)
        chosen = choose_tokens_by_row(logits, rows.sampling, seen, keys)
    return jnp.where(jnp.isnan(logits).any(axis=1), NOT_FINITE, chosen)


def seen_tokens(rows: Rows, vocab_size: int) -> Bool[Array, "B V"] | None:
    """Returns which tokens occur in the history of each row; None if no row samples."""
    if rows.sampling is None:
        return None
    history = jnp.asarray(rows.history)
    columns = jnp.where(history < 0, vocab_size, history)  # Columns out of range are dropped.
    none = jnp.zeros((len(history), vocab_size), bool)
    return none.at[jnp.arange(len(history))[:, None], columns].set(True, mode="drop")


def add_seen(
    seen: Bool[Array, "B V"] | None, tokens: Int[Array, " B"]
) -> Bool[Array, "B V"] | None:
    """Returns the seen tokens with one more in each row; negative ones stand for none."""
    if seen is None:
        return None
    return seen.at[jnp.arange(len(tokens)), jnp.maximum(tokens, 0)].max(tokens >= 0)


def _load_pages(
    keys: Float[Array, "L pages page_size K H"],
    values: Float[Array, "L pages page_size K H"],
    pages: Int[Array, " loaded"],
    new_keys: Float[Array, "L loaded page_size K H"],
    new_values: Float[Array, "L loaded page_size K H"],
) -> tuple[Array, Array]:
    return (
        keys.at[:, pages].set(new_keys, mode="drop"),
        values.at[:, pages].set(new_values, mode="drop"),
    )


def row_counts(max_rows: int) -> list[int]:
    """Returns the numbers of rows for which the program that generates is compiled."""
    counts = [count for count in (1, 8, 32, 128) if count < max_rows]
    return [*counts, max_rows]


def pages_per_row(num_tokens: int, page_size: int) -> int:
    """Returns the width of the page table for rows of up to `num_tokens` tokens."""
    width = SMALLEST_ROW
    while width < num_tokens:
        width *= 2
    return ceil_div(width, page_size)
