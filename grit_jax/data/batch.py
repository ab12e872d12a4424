"""What a training step reads: texts packed into rows, and who belongs to whom."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Bool, Int

# NumPy arrays on the host, global JAX arrays in a step.
Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """Rows (B) of fixed length (S), each holding several texts.

    On the host these may be some of the rows of the whole batch: those that its devices hold.

    Attributes:
      tokens: token ids; 0 where there is none.
      segment_ids: number of the token's text in the batch plus 1; 0 is padding.
      positions: position of the token in its text.
      mask: the tokens that count: those pooled for an embedding, those learned in a chat.
      num_texts: number of texts in the whole batch; a number may be left unused.
      num_rows: number of rows of the whole batch; None if these are all of them.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    mask: Bool[Array, "B S"]
    num_texts: int = dataclasses.field(metadata={"static": True})
    num_rows: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmbeddingBatch:
    """Queries and the passages that they are to be told apart by.

    Attributes:
      queries: Q texts.
      passages: P texts.
      positives: index of each query's positive among the passages.
      passage_ids: a number that two passages share if and only if they are the same text;
        -1 where the passages' number is left unused.
    """

    queries: PackedTexts
    passages: PackedTexts
    positives: Int[Array, " Q"]
    passage_ids: Int[Array, " P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The texts of one step; a stream that is not trained is None.

    Attributes:
      embedding: queries and passages.
      chats: conversations.
      num_tokens: tokens of all texts of the whole batch, where they have been counted.
    """

    embedding: EmbeddingBatch | None
    chats: PackedTexts | None
    num_tokens: Int[Array, ""] | None = None
