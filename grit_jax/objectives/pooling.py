"""From hidden states to one embedding a text, for rows that hold several texts.

Legend of dimensions: B rows, S positions, D hidden, T texts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

POOLINGS = ("mean", "weightedmean", "lasttoken", "cls")


def sum_by_text(
    values: Float[Array, "B S *D"], segment_ids: Int[Array, "B S"], num_texts: int
) -> Float[Array, " T *D"]:
    """Returns the sum of each text's values; text t has segment id t + 1, in whatever row."""
    rows = values.reshape(-1, *values.shape[2:])
    return jax.ops.segment_sum(rows, segment_ids.reshape(-1), num_texts + 1)[1:]


def pooling_weights(
    pooling: str,
    mask: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    num_texts: int,
) -> Float[Array, "B S"]:
    """Returns how much each token counts in its text's embedding, up to a factor for each text.

    Args:
      pooling: "mean" of the tokens in the mask; "weightedmean", where the k-th of them counts k
        times (SGPT, arXiv 2202.08904); "lasttoken"; or "cls", the first token.
      mask: the tokens to be pooled: not padding, and not the instruction.
      segment_ids: number of each token's text plus 1; 0 is padding.
      positions: position of each token in its text.
      num_texts: number of texts.

    Raises:
      ValueError: the pooling is unknown.
    """

    def of_own_text(values: Bool[Array, "B S"]) -> Float[Array, "B S"]:
        total = sum_by_text(values.astype(jnp.float32), segment_ids, num_texts)
        return jnp.concatenate([jnp.zeros(1), total])[segment_ids]

    is_token = segment_ids > 0
    if pooling == "mean":
        return mask.astype(jnp.float32)
    if pooling == "weightedmean":
        instruction_length = of_own_text(is_token & ~mask)
        return jnp.where(mask, positions - instruction_length + 1, 0.0)
    if pooling == "lasttoken":
        return (is_token & (positions == of_own_text(is_token) - 1)).astype(jnp.float32)
    if pooling == "cls":
        return (is_token & (positions == 0)).astype(jnp.float32)
    raise ValueError(f"pooling {pooling!r} must be one of {', '.join(POOLINGS)}")


def pool(
    hidden: Float[Array, "B S D"],
    mask: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    num_texts: int,
    pooling: str = "mean",
) -> Float[Array, "T D"]:
    """Returns the embedding of each text, in float32 and not normalised.

    The arguments are those of `pooling_weights`. A number that no text bears gets zeros.
    """
    weights = pooling_weights(pooling, mask, segment_ids, positions, num_texts)
    total = sum_by_text(hidden.astype(jnp.float32) * weights[..., None], segment_ids, num_texts)
    weight = sum_by_text(weights, segment_ids, num_texts)
    return total / jnp.maximum(weight, 1e-9)[:, None]


def normalize(embeddings: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns the embeddings scaled to length 1 (zeros stay zeros)."""
    squared = jnp.sum(embeddings**2, axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))
