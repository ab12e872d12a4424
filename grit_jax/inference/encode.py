"""Embeds token ids: packed into shared rows, or one text per row to return its KV cache.

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

from grit_jax.arithmetic import bucket_size, round_up
from grit_jax.data.batch import PackedTexts
from grit_jax.data.packing import pack
from grit_jax.inference.batch_packing import PackedCall, call_shapes, plan_calls, row_length_for
from grit_jax.inference.cache_utils import copy_row
from grit_jax.inference.compilation_notice import CompilationNotice
from grit_jax.models import Decoder, KVCache
from grit_jax.objectives.embedding import EmbeddingSpec, embed_texts
from grit_jax.sharding import batch_shards, shard_rows
from grit_jax.text.examples import Text

CALLS_IN_FLIGHT = 2


class Encoder:
    """Embeds texts with a model on a mesh.

    Args:
      model: model with its parameters on the mesh.
      mesh: the devices over which rows are split.
      in_turns: computes the items of an iterator, each of which is one call of a program, between
        other uses of the devices (`Engine.in_turns`).
      calls_in_flight: calls that are dispatched before the results of the first are awaited.

    Attributes:
      parameters: the first argument of `program`.
      program: compiled program that embeds packed texts; its last argument is an `EmbeddingSpec`.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        in_turns: Callable[[Iterator[Any]], Iterator[Any]] = iter,
        calls_in_flight: int = CALLS_IN_FLIGHT,
    ):
        self._graph, self.parameters = nnx.split(model)
        self._mesh = mesh
        self._in_turns, self._calls_in_flight = in_turns, calls_in_flight
        self._embedding_size = model.config.embedding_projection_size or model.config.hidden_size
        replicated = NamedSharding(mesh, PartitionSpec())
        self.program = jax.jit(self._embed_packed, static_argnums=2, out_shardings=replicated)
        self._notice = CompilationNotice()
        self._program_with_cache = jax.jit(self._embed_with_cache, static_argnums=(2, 3))

    def embed(
        self,
        texts: Sequence[Text],
        spec: EmbeddingSpec,
        tokens_per_device: int,
        on_progress: Callable[[int], None],
    ) -> Float32[np.ndarray, "T P"]:
        """Returns the embeddings of texts, several of which share a row.

        Args:
          texts: token ids, with a mask that is False for `<s>` and the instruction.
          spec: attention, pooling and normalization.
          tokens_per_device: maximum tokens of a call on one device, padding included.
          on_progress: called with the number of texts that each call has embedded.
        """
        embeddings = np.zeros((len(texts), self._embedding_size), np.float32)
        for members, rows in self._in_turns(self._dispatch(texts, spec, tokens_per_device)):
            embeddings[members] = np.asarray(rows)[: len(members)]
            on_progress(len(members))
        return embeddings

    def compile(
        self, num_texts: int, max_length: int, spec: EmbeddingSpec, tokens_per_device: int
    ) -> None:
        """Compiles the programs that `embed` uses for texts.

        Args:
          num_texts: maximum number of texts.
          max_length: maximum tokens of a text.
          spec: see `embed`.
          tokens_per_device: see `embed`.
        """
        text = Text(np.zeros(1, np.int32), np.ones(1, bool))
        shards = batch_shards(self._mesh)
        for num_rows, row_length in call_shapes(num_texts, max_length, shards, tokens_per_device):
            _, rows = self._call([text], PackedCall([[0]], num_rows, row_length), spec)
            rows.block_until_ready()

    def embed_with_caches(
        self,
        texts: Sequence[Text],
        spec: EmbeddingSpec,
        tokens_per_device: int,
        on_progress: Callable[[int], None],
    ) -> tuple[Float32[np.ndarray, "T P"], list[KVCache]]:
        """Returns the embeddings of texts, and the KV cache of each text.

        The arguments are those of `embed`. A cache has one row with one slot for each token, in
        host memory.
        """
        shards = batch_shards(self._mesh)
        row_length = row_length_for(max(len(text) for text in texts))
        num_rows = max(1, tokens_per_device // row_length) * shards
        num_rows = min(num_rows, round_up(bucket_size(len(texts)), shards))
        embeddings = np.zeros((len(texts), self._embedding_size), np.float32)
        caches: dict[int, KVCache] = {}
        calls = self._dispatch_with_caches(texts, spec, num_rows, row_length)
        for members, (embedded, cache) in self._in_turns(calls):
            embeddings[members] = np.asarray(embedded)[: len(members)]
            cache = jax.tree.map(np.asarray, cache)
            for row, member in enumerate(members):
                caches[member] = copy_row(cache, row, len(texts[member]))
            on_progress(len(members))
        return embeddings, [caches[member] for member in range(len(texts))]

    def _dispatch_with_caches(
        self, texts: Sequence[Text], spec: EmbeddingSpec, num_rows: int, row_length: int
    ) -> Iterator[tuple[list[int], Any]]:
        """Yields the indices of the texts of each call, and their embeddings and caches."""
        for instruction_length, members in _group_by_instruction(texts, spec, num_rows):
            rows = [[row] for row in range(len(members))]
            group = [texts[member] for member in members]
            packed = pack(group, rows, num_rows, row_length, num_rows)
            purpose = f"embeds {num_rows} x {row_length} tokens with caches"
            with jax.set_mesh(self._mesh), self._notice.around(purpose, spec, instruction_length):
                embedded = self._program_with_cache(
                    self.parameters, shard_rows(packed, self._mesh), spec, instruction_length
                )
            yield members, embedded

    def _dispatch(
        self, texts: Sequence[Text], spec: EmbeddingSpec, tokens_per_device: int
    ) -> Iterator[tuple[list[int], Any]]:
        """Yields the indices of the texts of each call, and their embeddings on the devices."""
        in_flight: list[tuple[list[int], Any]] = []
        lengths = [len(text) for text in texts]
        for call in plan_calls(lengths, batch_shards(self._mesh), tokens_per_device):
            in_flight.append(self._call(texts, call, spec))
            if len(in_flight) > self._calls_in_flight:
                yield in_flight.pop(0)
        yield from in_flight

    def _call(
        self, texts: Sequence[Text], call: PackedCall, spec: EmbeddingSpec
    ) -> tuple[list[int], Any]:
        """Returns the indices of the texts of a call, and their embeddings on the devices."""
        members, packed = _pack_call(texts, call)
        purpose = f"embeds {call.num_rows} x {call.row_length} tokens"
        with jax.set_mesh(self._mesh), self._notice.around(purpose, spec):
            rows = self.program(self.parameters, shard_rows(packed, self._mesh), spec)
        return members, rows

    def _embed_packed(
        self, state: Any, texts: PackedTexts, spec: EmbeddingSpec
    ) -> Float[Array, "max_texts P"]:
        return embed_texts(nnx.merge(self._graph, state), texts, spec)

    def _embed_with_cache(
        self, state: Any, texts: PackedTexts, spec: EmbeddingSpec, instruction_length: int
    ) -> tuple[Float[Array, "B P"], KVCache]:
        """Returns the embeddings and the cache of rows that hold one text each.

        The first `instruction_length` tokens are processed in a separate call: in a call with a
        cache, all tokens are causal or all are bidirectional.
        """
        model = nnx.merge(self._graph, state)
        B, S = texts.tokens.shape
        is_token = (texts.segment_ids > 0).astype(jnp.int32)
        cache, hidden = model.make_cache(B, S), []
        spans = (slice(0, instruction_length), slice(instruction_length, S))
        for letter, span in zip(spec.attention, spans, strict=False):
            if span.start < span.stop:
                hidden_of_span, cache = model(
                    texts.tokens[:, span],
                    texts.positions[:, span],
                    is_token[:, span],
                    is_causal=letter == "c",
                    cache=cache,
                )
                hidden.append(hidden_of_span)
        return spec.embed_pooled(model, spec.pool(jnp.concatenate(hidden, axis=1), texts)), cache


def _group_by_instruction(
    texts: Sequence[Text], spec: EmbeddingSpec, group_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields groups of texts for one call: the length of their instruction, and their indices.

    The length is 0 if instruction and text have the same attention. Instruction lengths can differ
    by text, because a token that spans the boundary counts as text.
    """
    lengths = [0] * len(texts)
    if spec.attention[0] != spec.attention[1]:
        lengths = [int(np.argmax(text.mask)) for text in texts]
    for length in sorted(set(lengths)):
        members = [member for member, own in enumerate(lengths) if own == length]
        for start in range(0, len(members), group_size):
            yield length, members[start : start + group_size]


def _pack_call(texts: Sequence[Text], call: PackedCall) -> tuple[list[int], PackedTexts]:
    """Returns the indices of a call's texts in the order of its embeddings, and its rows."""
    members = [member for row in call.rows for member in row]
    counter = iter(range(len(members)))
    rows = [[next(counter) for _ in row] for row in call.rows]
    chosen = [texts[member] for member in members]
    return members, pack(chosen, rows, call.num_rows, call.row_length, call.max_texts)
