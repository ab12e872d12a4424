"""The contrastive loss: each query against every passage of the global batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
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
    query_ids: Int[Array | np.ndarray, " queries"] | None = None,
    is_symmetric: bool = False,
) -> Float[Array, ""]:
    """InfoNCE (arXiv 1807.03748): the mean over queries of -log p(positive).

    A passage that is the positive of a query is not a negative of that query, nor of its copies.

    Args:
      query_embeddings: embedding of each query, of length 1.
      passage_embeddings: embedding of each passage of the global batch, of length 1.
      positives: index of each query's positive among the passages.
      passage_ids: index of the first copy of each passage's text; -1 marks an index without a
        passage.
      temperature: divisor of the scores.
      query_ids: index of the first copy of each query's text; by default all queries differ.
      is_symmetric: average with the loss of the other direction, in which each positive is
        classified among all queries (CLIP, arXiv 2103.00020). A query that has that positive, or
        whose copy has it, is not one of the negatives.
    """
    passage_ids = jnp.asarray(passage_ids)
    positive_ids = passage_ids[positives]
    own = jnp.arange(len(positives))
    query_ids = own if query_ids is None else jnp.asarray(query_ids)
    loss = _info_nce(
        query_embeddings,
        passage_embeddings,
        positives,
        query_ids,
        passage_ids,
        (query_ids, positive_ids),
        temperature,
    )
    if not is_symmetric:
        return loss
    reverse_loss = _info_nce(
        passage_embeddings[positives],
        query_embeddings,
        own,
        positive_ids,
        query_ids,
        (positive_ids, query_ids),
        temperature,
    )
    return (loss + reverse_loss) / 2


def _info_nce(
    row_embeddings: Float[Array, "rows embedding"],
    column_embeddings: Float[Array, "columns embedding"],
    positive_columns: Int[Array | np.ndarray, " rows"],
    row_ids: Int[Array, " rows"],
    column_ids: Int[Array, " columns"],
    positive_pairs: tuple[Int[Array, " pairs"], Int[Array, " pairs"]],
    temperature: float | Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the mean over rows of -log p(positive column), among the columns that are negatives.

    Each device scores its own rows against all columns, a block of rows at a time, so that the
    memory for scores does not grow with the number of rows.

    Args:
      row_embeddings: embedding of each row.
      column_embeddings: embedding of each column.
      positive_columns: index of each row's positive among the columns.
      row_ids: index of the first copy of each row.
      column_ids: index of the first copy of each column, -1 for an unused column.
      positive_pairs: IDs of rows and of columns: a column is not a negative of a row if their IDs
        are one of these pairs.
      temperature: divisor of the scores.
    """
    num_rows = len(row_embeddings)
    columns = with_logical_constraint(column_embeddings, None, None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_block(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        embeddings, positives, ids, is_row = block
        scores = jnp.einsum("RD,CD->RC", embeddings, columns) / temperature
        scores = with_logical_constraint(scores, "batch", None)
        is_positive = jnp.arange(len(columns)) == positives[:, None]
        is_negative = (column_ids >= 0) & ~_are_pairs(ids, column_ids, positive_pairs)
        scores = jnp.where(is_positive | is_negative, scores, -jnp.inf)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, positives)
        return total + jnp.sum(jnp.where(is_row, losses, 0)), None

    rows = (row_embeddings, jnp.asarray(positive_columns), row_ids, jnp.ones(num_rows, bool))
    total, _ = jax.lax.scan(add_block, jnp.zeros(()), _blocks(rows, num_rows))
    return total / num_rows


def _are_pairs(
    row_ids: Int[Array, " rows"],
    column_ids: Int[Array, " columns"],
    pairs: tuple[Int[Array, " pairs"], Int[Array, " pairs"]],
) -> Bool[Array, "rows columns"]:
    """Returns for each row and column whether their IDs are one of the pairs.

    A column may be in pairs with several rows, so that comparing one ID of each is not enough.
    """
    pair_row_ids, pair_column_ids = pairs
    is_row = pair_row_ids[:, None] == row_ids  # [pairs, rows]
    by_id = jnp.zeros((len(column_ids), len(row_ids)), bool).at[pair_column_ids].max(is_row)
    return with_logical_constraint(by_id[column_ids], None, "batch").T


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
