"""The contrastive loss: each query against every passage of the global batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax

from grit_jax.arithmetic import ceil_div
from grit_jax.sharding import current_shards, microbatch, with_logical_constraint

# Rows of scores that a device computes at a time.
BLOCK_ROWS = 512


def contrastive_loss(
    query_embeddings: Float[Array, "queries embedding"],
    passage_embeddings: Float[Array, "passages embedding"],
    positives: Int[Array | np.ndarray, " queries"],
    passage_ids: Int[Array | np.ndarray, " passages"],
    temperature: float | Float[Array, ""],
    *,
    is_symmetric: bool = False,
) -> Float[Array, ""]:
    """InfoNCE (arXiv 1807.03748): the mean over queries of -log p(positive).

    Args:
      query_embeddings: embedding of each query, of length 1.
      passage_embeddings: embedding of each passage of the global batch, of length 1.
      positives: index of each query's positive among the passages.
      passage_ids: ID of each passage's text. Passages with the same ID are the same text, and a
        copy of a query's positive is not one of the query's negatives. -1 marks an index without a
        passage.
      temperature: divisor of the scores.
      is_symmetric: average with the loss of the other direction, in which each positive is
        classified among all queries (CLIP, arXiv 2103.00020). A query whose positive is a copy of
        that positive is not one of the negatives.
    """
    passage_ids = jnp.asarray(passage_ids)
    positive_ids = passage_ids[positives]
    loss = _info_nce(
        query_embeddings, passage_embeddings, positives, positive_ids, passage_ids, temperature
    )
    if not is_symmetric:
        return loss
    own = jnp.arange(len(positives))
    positive_embeddings = passage_embeddings[positives]
    reverse_loss = _info_nce(
        positive_embeddings, query_embeddings, own, positive_ids, positive_ids, temperature
    )
    return (loss + reverse_loss) / 2


def _info_nce(
    row_embeddings: Float[Array, "rows embedding"],
    column_embeddings: Float[Array, "columns embedding"],
    positive_columns: Int[Array | np.ndarray, " rows"],
    row_ids: Int[Array, " rows"],
    column_ids: Int[Array, " columns"],
    temperature: float | Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the mean over rows of -log p(positive column), among the columns with other ids.

    Each device scores its own rows against all columns, a block of rows at a time, so that the
    memory for scores does not grow with the number of rows.
    """
    num_rows = len(row_embeddings)
    columns = with_logical_constraint(column_embeddings, None, None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_block(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        embeddings, positives, ids, is_row = block
        scores = jnp.einsum("RD,CD->RC", embeddings, columns) / temperature
        scores = with_logical_constraint(scores, "batch", None)
        is_positive = jnp.arange(len(columns)) == positives[:, None]
        is_negative = (column_ids >= 0) & (column_ids != ids[:, None])
        scores = jnp.where(is_positive | is_negative, scores, -jnp.inf)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, positives)
        return total + jnp.sum(jnp.where(is_row, losses, 0)), None

    rows = (row_embeddings, jnp.asarray(positive_columns), row_ids, jnp.ones(num_rows, bool))
    total, _ = jax.lax.scan(add_block, jnp.zeros(()), _blocks(rows, num_rows))
    return total / num_rows


def _blocks(rows: tuple[jax.Array, ...], num_rows: int) -> tuple[jax.Array, ...]:
    """Returns the rows as [blocks, rows of a block, ...], padded with zeros."""
    shards = current_shards("batch")
    num_blocks = ceil_div(num_rows, BLOCK_ROWS * shards)
    padding = -num_rows % (num_blocks * shards)

    def divide(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        padded = with_logical_constraint(padded, "batch", *(None,) * (array.ndim - 1))
        return microbatch(padded, num_blocks)

    return jax.tree.map(divide, rows)
