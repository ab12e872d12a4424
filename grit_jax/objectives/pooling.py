"""Pooling: one embedding for each text of packed rows.

Dimensions: B rows, S positions, D hidden size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

POOLINGS = ("mean", "weightedmean", "lasttoken", "cls")


def sum_by_text(
    values: Float[Array, "B S *D"], segment_ids: Int[Array | np.ndarray, "B S"], num_texts: int
) -> Float[Array, " {num_texts} *D"]:
    """Returns the sum of the values of each text.

    Args:
      values: a value for each token.
      segment_ids: index of each token's text in the batch, plus 1; 0 is padding.
      num_texts: number of texts.
    """
    rows = values.reshape(-1, *values.shape[2:])
    return jax.ops.segment_sum(rows, segment_ids.reshape(-1), num_texts + 1)[1:]


def pooling_weights(
    pooling: str,
    mask: Bool[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"],
    positions: Int[Array | np.ndarray, "B S"],
    num_texts: int,
) -> Float[Array, "B S"]:
    """Returns the weight of each token in its text's embedding, up to a factor for each text.

    Args:
      pooling: "mean" over the mask; "weightedmean", in which the k-th token of the mask has weight
        k (SGPT, arXiv 2202.08904); "lasttoken"; or "cls", the first token.
      mask: the tokens to pool, without padding and usually without the instruction.
      segment_ids: index of each token's text in the batch, plus 1; 0 is padding.
      positions: position of each token in its text.
      num_texts: number of texts.

    Raises:
      ValueError: the pooling is unknown.
    """

    def count_in_text(values: Bool[Array | np.ndarray, "B S"]) -> Float[Array, "B S"]:
        total = sum_by_text(jnp.asarray(values, jnp.float32), segment_ids, num_texts)
        return jnp.concatenate([jnp.zeros(1), total])[segment_ids]

    segment_ids = jnp.asarray(segment_ids)
    is_token = segment_ids > 0
    if pooling == "mean":
        return jnp.asarray(mask, jnp.float32)
    if pooling == "weightedmean":
        instruction_length = count_in_text(is_token & ~mask)
        return jnp.where(mask, positions - instruction_length + 1, 0.0)
    if pooling == "lasttoken":
        return (is_token & (positions == count_in_text(is_token) - 1)).astype(jnp.float32)
    if pooling == "cls":
        return (is_token & (positions == 0)).astype(jnp.float32)
    raise ValueError(f"pooling {pooling!r} must be one of {', '.join(POOLINGS)}")


def pool(
    hidden: Float[Array, "B S D"],
    mask: Bool[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"],
    positions: Int[Array | np.ndarray, "B S"],
    num_texts: int,
    pooling: str = "mean",
) -> Float[Array, "{num_texts} D"]:
    """Returns the embedding of each text in float32, not normalized; 0 for a text without tokens.

    For the arguments see `pooling_weights`.
    """
    weights = pooling_weights(pooling, mask, segment_ids, positions, num_texts)
    total = sum_by_text(hidden.astype(jnp.float32) * weights[..., None], segment_ids, num_texts)
    weight = sum_by_text(weights, segment_ids, num_texts)
    return total / jnp.maximum(weight, 1e-9)[:, None]


def normalize(embeddings: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
    """Returns the embeddings scaled to length 1; an embedding of zeros stays zero."""
    squared = jnp.sum(embeddings**2, axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))
