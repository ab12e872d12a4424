"""Attention over rows that may hold several texts.

Legend of dimensions: B rows, S query positions, T key positions, N query heads, K key/value heads,
H head dimension.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_segment_ids: Int[Array, "B S"],
    key_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B T"],
    *,
    is_causal: bool,
    causal_queries: Bool[Array, "B S"] | None = None,
    sliding_window: int | None = None,
) -> Bool[Array, "B S T"]:
    """Returns which keys each query may see.

    A query sees the keys of its own segment; if it is causal, of those only itself and the ones
    before it; with `sliding_window`, only those less than that many positions away. All queries are
    causal with `is_causal`, without it those of `causal_queries`. A row that holds one text of
    three tokens, one of two and one of padding, first with `is_causal`, then with the first two
    tokens of the first text as `causal_queries`:

        segment    1 1 1 2 2 0        1 1 1 2 2 0
        1          x                  x
        1          x x                x x
        1          x x x              x x x
        2                x                  x x
        2                x x                x x
        0                    x                  x

    Padding (segment 0) sees padding, so that no query is left without a key.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    if is_causal:
        mask &= distance >= 0
    elif causal_queries is not None:
        mask &= (distance >= 0) | ~causal_queries[:, :, None]
    if sliding_window is not None:
        mask &= jnp.abs(distance) < sliding_window
    return mask


def attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B S N H"]:
    """Softmax attention, scaled by 1/sqrt(H); each key head serves N/K query heads.

    Scores and softmax are in float32 whatever the type of the inputs.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="xla")
