"""The contrastive loss of GRIT: each query against every passage of the global batch.

Legend of dimensions: Q queries, P passages, R rows, C columns, D embedding.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.sharding import current_shards, in_parts, with_logical_constraint

# Rows of scores that exist on a device at a time.
BLOCK_ROWS = 512


def contrastive_loss(
    query_embeddings: Float[Array, "Q D"],
    passage_embeddings: Float[Array, "P D"],
    positives: Int[Array, " Q"],
    passage_ids: Int[Array, " P"],
    temperature: float | Float[Array, ""],
    *,
    is_symmetric: bool = False,
) -> Float[Array, ""]:
    """InfoNCE (arXiv 1807.03748; GRIT, section 2): mean over queries of -log p(own positive).

    Args:
      query_embeddings: one embedding a query, of length 1.
      passage_embeddings: one embedding a passage of the global batch, of length 1.
      positives: index of each query's positive among the passages.
      passage_ids: a number that two passages share if and only if they are the same text; a
        copy of a query's positive is no negative to it. -1 marks a place that holds no passage.
      temperature: what the scores are divided by.
      is_symmetric: take the mean with the loss of the other direction, in which each positive is
        to find its query among all queries (CLIP, arXiv 2103.00020). Queries of a copy of the
        positive are no negatives to it.
    """
    contents = passage_ids[positives]
    loss = _info_nce(
        query_embeddings, passage_embeddings, positives, contents, passage_ids, temperature
    )
    if not is_symmetric:
        return loss
    own = jnp.arange(len(positives))
    positive_embeddings = passage_embeddings[positives]
    other_way = _info_nce(
        positive_embeddings, query_embeddings, own, contents, contents, temperature
    )
    return (loss + other_way) / 2


def _info_nce(
    row_embeddings: Float[Array, "R D"],
    column_embeddings: Float[Array, "C D"],
    own_columns: Int[Array, " R"],
    row_contents: Int[Array, " R"],
    column_contents: Int[Array, " C"],
    temperature: float | Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the mean over rows of -log p(own column), among the columns of other content.

    Each device scores rows of its own against all columns, a block at a time: no device ever holds
    the whole matrix, and its memory does not grow with the number of rows.
    """
    R = len(row_embeddings)
    columns = with_logical_constraint(column_embeddings, None, None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_block(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        embeddings, own, contents, is_row = block
        scores = jnp.einsum("RD,CD->RC", embeddings, columns) / temperature
        scores = with_logical_constraint(scores, "batch", None)
        is_own = jnp.arange(len(columns)) == own[:, None]
        is_other = (column_contents >= 0) & (column_contents != contents[:, None])
        scores = jnp.where(is_own | is_other, scores, -jnp.inf)
        own_scores = jnp.take_along_axis(scores, own[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(scores, axis=1) - own_scores
        return total + jnp.sum(jnp.where(is_row, losses, 0)), None

    rows = (row_embeddings, own_columns, row_contents, jnp.ones(R, bool))
    total, _ = jax.lax.scan(add_block, jnp.zeros(()), _blocks(rows, R))
    return total / R


def _blocks(rows: tuple[jax.Array, ...], num_rows: int) -> tuple[jax.Array, ...]:
    """Returns the rows as [blocks, rows of a block, ...], filled up with zeros."""
    shards = current_shards("batch")
    num_blocks = math.ceil(num_rows / (BLOCK_ROWS * shards))
    padding = -num_rows % (num_blocks * shards)

    def divide(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        padded = with_logical_constraint(padded, "batch", *(None,) * (array.ndim - 1))
        return in_parts(padded, num_blocks)

    return jax.tree.map(divide, rows)
