"""From token ids to embeddings: packed rows through the model, or one text a row into caches.

Legend of dimensions: T texts, P embedding, B rows, S positions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32
import numpy as np

from grit_jax.data.batch import PackedTexts
from grit_jax.data.packing import pack
from grit_jax.inference.batch_packing import PackedCall, plan_calls, row_length_for
from grit_jax.models import Decoder, KVCache
from grit_jax.objectives.embedding import EmbeddingSpec, embed_texts
from grit_jax.sharding import batch_shards, partition_spec
from grit_jax.text.examples import Text

# Calls that the devices are given before the first is waited for.
CALLS_AHEAD = 2


class Encoder:
    """Embeds texts with a model on a mesh.

    Args:
      model: its parameters lie on the mesh.
      mesh: rows are split over it.

    Attributes:
      parameters: what the program is given first.
      program: embeds packed texts; `EmbeddingSpec` is its last argument.
    """

    def __init__(self, model: Decoder, mesh: Mesh):
        self._graph, self.parameters = nnx.split(model)
        self._mesh = mesh
        self._embedding_size = model.config.embedding_projection_size or model.config.hidden_size
        whole = NamedSharding(mesh, PartitionSpec())
        self.program = jax.jit(self._embed_packed, static_argnums=2, out_shardings=whole)
        self._embed_and_keep = jax.jit(self._embed_with_cache, static_argnums=(2, 3))

    def embed(
        self, texts: Sequence[Text], spec: EmbeddingSpec, places: int, done: Callable[[int], None]
    ) -> Float32[np.ndarray, "T P"]:
        """Returns the embeddings of texts, several of which share a row.

        Args:
          texts: token ids, and which of them are no instruction.
          spec: how they are read and pooled.
          places: the most places of a call on one device.
          done: is told the number of texts that each call has embedded.
        """
        embeddings = np.zeros((len(texts), self._embedding_size), np.float32)
        for numbers, rows in self._ahead(texts, spec, places):
            embeddings[numbers] = np.asarray(rows)[: len(numbers)]
            done(len(numbers))
        return embeddings

    def embed_with_caches(
        self, texts: Sequence[Text], spec: EmbeddingSpec, places: int, done: Callable[[int], None]
    ) -> tuple[Float32[np.ndarray, "T P"], list[KVCache]]:
        """Returns the embeddings of texts, and for each the cache of its keys and values.

        The arguments are those of `embed`. A cache has one row, as many slots as its text has
        tokens, and lies in the host's memory.
        """
        shards = batch_shards(self._mesh)
        row_length = row_length_for(max(len(text) for text in texts))
        num_rows = max(1, places // row_length) * shards
        num_rows = min(num_rows, -(-len(texts) // shards) * shards)
        embeddings = np.zeros((len(texts), self._embedding_size), np.float32)
        caches: dict[int, KVCache] = {}
        for instruction_length, numbers in _read_alike(texts, spec, num_rows):
            rows = [[row] for row in range(len(numbers))]
            group = [texts[number] for number in numbers]
            packed = pack(group, rows, num_rows, row_length, num_rows)
            with jax.set_mesh(self._mesh):
                found, cache = self._embed_and_keep(
                    self.parameters, self._place(packed), spec, instruction_length
                )
            embeddings[numbers] = np.asarray(found)[: len(numbers)]
            cache = jax.tree.map(np.asarray, cache)
            for row, number in enumerate(numbers):
                caches[number] = _row_of(cache, row, len(texts[number]))
            done(len(numbers))
        return embeddings, [caches[number] for number in range(len(texts))]

    def _ahead(
        self, texts: Sequence[Text], spec: EmbeddingSpec, places: int
    ) -> Iterator[tuple[list[int], Any]]:
        """Yields the numbers of the texts of each call and their embeddings, on the devices."""
        waiting: list[tuple[list[int], Any]] = []
        lengths = [len(text) for text in texts]
        for call in plan_calls(lengths, batch_shards(self._mesh), places):
            numbers, packed = _pack_call(texts, call)
            with jax.set_mesh(self._mesh):
                rows = self.program(self.parameters, self._place(packed), spec)
            waiting.append((numbers, rows))
            if len(waiting) > CALLS_AHEAD:
                yield waiting.pop(0)
        yield from waiting

    def _place(self, packed: PackedTexts) -> PackedTexts:
        return jax.device_put(packed, NamedSharding(self._mesh, partition_spec("batch")))

    def _embed_packed(self, state: Any, texts: PackedTexts, spec: EmbeddingSpec) -> jax.Array:
        model = nnx.merge(self._graph, state)
        return embed_texts(model, texts, spec)

    def _embed_with_cache(
        self, state: Any, texts: PackedTexts, spec: EmbeddingSpec, instruction_length: int
    ) -> tuple[Float[Array, "B P"], KVCache]:
        """Returns embeddings and the cache of rows that hold one text each.

        The first `instruction_length` tokens, which are read in another way than the rest, are read
        before them: a call of the model with a cache reads all its tokens in one way.
        """
        model = nnx.merge(self._graph, state)
        B, S = texts.tokens.shape
        is_token = (texts.segment_ids > 0).astype(jnp.int32)
        cache, parts = model.make_cache(B, S), []
        places = (slice(0, instruction_length), slice(instruction_length, S))
        for letter, part in zip(spec.attention, places, strict=False):
            if part.start < part.stop:
                hidden, cache = model(
                    texts.tokens[:, part],
                    texts.positions[:, part],
                    is_token[:, part],
                    is_causal=letter == "c",
                    cache=cache,
                )
                parts.append(hidden)
        return spec.project(model, spec.pool(jnp.concatenate(parts, axis=1), texts)), cache


def _read_alike(
    texts: Sequence[Text], spec: EmbeddingSpec, at_once: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields texts that can be read in one call: tokens to be read before the rest, and numbers.

    An instruction may have a token less in front of one text than of another: what a token shares
    with the text is the text's.
    """
    lengths = [0] * len(texts)
    if spec.attention[0] != spec.attention[1]:
        lengths = [int(np.argmax(text.mask)) for text in texts]
    for length in sorted(set(lengths)):
        numbers = [number for number, own in enumerate(lengths) if own == length]
        for start in range(0, len(numbers), at_once):
            yield length, numbers[start : start + at_once]


def _pack_call(texts: Sequence[Text], call: PackedCall) -> tuple[list[int], PackedTexts]:
    """Returns the numbers of a call's texts in the order of its embeddings, and its rows."""
    numbers = [number for row in call.rows for number in row]
    places = iter(range(len(numbers)))
    rows = [[next(places) for _ in row] for row in call.rows]
    chosen = [texts[number] for number in numbers]
    return numbers, pack(chosen, rows, call.num_rows, call.row_length, call.num_texts)


def _row_of(cache: KVCache, row: int, length: int) -> KVCache:
    """Returns a copy of one row of a cache in the host's memory, without its padding."""
    parts: Any = {
        "keys": cache.keys[:, row : row + 1, :length],
        "values": cache.values[:, row : row + 1, :length],
        "positions": cache.positions[row : row + 1, :length],
        "segment_ids": cache.segment_ids[row : row + 1, :length],
        "length": np.int32(length),
    }
    return KVCache(**jax.tree.map(np.copy, parts))
