"""The batch of a training step: texts packed into rows, and the arrays that relate the texts.

Legend of dimensions: B rows, S positions, Q queries, P passages.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Bool, Int

from grit_jax.pytree import pytree_dataclass

# NumPy arrays on the host, global JAX arrays in a step.
Array = Any


@pytree_dataclass
class PackedTexts:
    """Rows of fixed length, each of which holds several texts.

    On a host, these may be only the rows that the host's devices hold.

    Attributes:
      tokens: token ids; 0 for padding.
      segment_ids: index of the token's text in the batch, plus 1; 0 for padding.
      positions: position of the token in its text.
      mask: the tokens that are pooled for an embedding, or predicted in a chat.
      num_texts: number of text indices of the whole batch; an index may be unused.
      num_rows: number of rows of the whole batch, or None if these are all of them.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    num_texts: int = dataclasses.field(metadata={"static": True})
    num_rows: int | None = dataclasses.field(default=None, metadata={"static": True})


@pytree_dataclass
class EmbeddingBatch:
    """Queries, and the passages that every query is scored against.

    Attributes:
      queries: Q texts.
      passages: P texts.
      positives: index of each query's positive among the passages.
      passage_ids: index of the first copy of each passage among the passages; -1 for an unused
        index.
      query_ids: index of the first copy of each query among the queries; None if all queries are
        treated as different.
    """

    queries: PackedTexts
    passages: PackedTexts
    positives: Int[Array, " Q"]
    passage_ids: Int[Array, " P"]
    query_ids: Int[Array, " Q"] | None = None

    @property
    def streams(self) -> dict[str, PackedTexts]:
        """The rows of each stream of this kind of text."""
        return {"query": self.queries, "passage": self.passages}


@pytree_dataclass
class ChatBatch:
    """Conversations, whose answers the model learns to predict."""

    chats: PackedTexts

    @property
    def streams(self) -> dict[str, PackedTexts]:
        """The rows of each stream of this kind of text."""
        return {"chat": self.chats}


@pytree_dataclass
class Batch:
    """The texts of one step.

    Attributes:
      parts: the part of each kind of text that is trained, by the name of the kind: an
        `EmbeddingBatch` for "embedding", a `ChatBatch` for "generative".
      num_tokens: tokens of all texts of the whole batch, if they have been counted.
    """

    parts: Mapping[str, Any]
    num_tokens: Int[Array, ""] | None = None

    @property
    def streams(self) -> dict[str, PackedTexts]:
        """The rows of all streams, by the stream's name."""
        return {name: rows for part in self.parts.values() for name, rows in part.streams.items()}
