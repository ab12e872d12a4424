"""Attention over rows that may hold several texts, by the implementation that suits the platform.

Legend of dimensions: B rows, S query positions, T key positions, N query heads, K key/value heads,
H head dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.splash import splash_attention, splash_unsupported_reason
from grit_jax.sharding import platform

# A query block reads all keys and values: 1,024 products for each byte of them. A v6e multiplies
# 560 times while it reads a byte.
SPLASH_BLOCK_SIZE = 1024

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")

# What "auto" takes where it can serve; everywhere else it takes "xla".
PREFERRED = {"tpu": "splash"}


class AttentionError(ValueError):
    """An implementation of attention was asked for a case that it does not serve."""


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may see.

    A query sees the keys of its own segment; if it is causal, of those only itself and the ones
    before it; with a sliding window, only those less than that many positions away. All queries are
    causal with `is_causal`, without it those of `causal_query_mask`. A row that holds one text of
    three tokens, one of two and one of padding, first with `is_causal`, then with the first two
    tokens of the first text as `causal_query_mask`:

        segment    1 1 1 2 2 0        1 1 1 2 2 0
        1          x                  x
        1          x x                x x
        1          x x x              x x x
        2                x                  x x
        2                x x                x x
        0                    x                  x

    Padding (segment 0) sees padding, so that no query is left without a key.

    Attributes:
      segment_ids: which text of its row a query belongs to.
      positions: position of each query in its text.
      is_causal: whether all queries are causal.
      causal_query_mask: the queries that are causal even so.
      sliding_window: a key must be less than this many positions away; None: at any distance.
      cached: segment ids and positions of the keys, where they are those of a cache; None where
        they are the queries' own.
    """

    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    is_causal: bool
    causal_query_mask: Bool[Array, "B S"] | None = None
    sliding_window: int | None = None
    cached: tuple[Int[Array, "B T"], Int[Array, "B T"]] | None = None

    def mask(self) -> Bool[Array, "B S T"]:
        """Returns for each query and key whether the one may see the other."""
        key_segment_ids, key_positions = self.cached or (self.segment_ids, self.positions)
        distance = self.positions[:, :, None] - key_positions[:, None, :]
        mask = self.segment_ids[:, :, None] == key_segment_ids[:, None, :]
        if self.is_causal:
            mask &= distance >= 0
        elif self.causal_query_mask is not None:
            mask &= (distance >= 0) | ~self.causal_query_mask[:, :, None]
        if self.sliding_window is not None:
            mask &= jnp.abs(distance) < self.sliding_window
        return mask


def attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    visibility: AttentionMask,
    implementation: str = "auto",
    splash_block_size: int = SPLASH_BLOCK_SIZE,
) -> Float[Array, "B S N H"]:
    """Softmax attention, scaled by 1/sqrt(H); each key head serves N/K query heads.

    Scores and softmax are in float32 whatever the type of the inputs.

    Args:
      query: queries.
      key: keys.
      value: values.
      visibility: which keys each query may see.
      implementation: "xla" serves every case. "splash" is the kernel for TPUs (interpreted, and
        slow, on a CPU), which tells before from after by the place in the row: positions have to
        rise by one within a segment. "cudnn" is the kernel for NVIDIA GPUs. "auto" takes
        "splash" on a TPU for the cases that it serves, and "xla" for all others.
      splash_block_size: positions that a block of the kernel for TPUs has at most.

    Raises:
      AttentionError: the implementation that was asked for does not serve the case.
    """
    if implementation == "auto":
        kernel = PREFERRED.get(platform(), "xla")
        implementation = "xla" if _unsupported_reason(kernel, query, key, visibility) else kernel
    elif unserved := _unsupported_reason(implementation, query, key, visibility):
        raise AttentionError(
            f"config.model.attention_implementation={implementation!r} does not serve {unserved}; "
            "'auto' takes another one there"
        )
    if implementation == "splash":
        return splash_attention(
            query,
            key,
            value,
            visibility.segment_ids,
            is_causal=visibility.is_causal,
            sliding_window=visibility.sliding_window,
            block_size=splash_block_size,
        )
    mask = visibility.mask()[:, None]  # [B, S, T] -> [B, 1, S, T]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation=cast(Any, implementation)
    )


def _unsupported_reason(
    implementation: str, query: jax.Array, key: jax.Array, visibility: AttentionMask
) -> str | None:
    """Returns what it is in a case that an implementation does not serve; None: it serves it."""
    if implementation == "xla":
        return None
    if visibility.cached is not None:
        return "a cache"
    if implementation == "cudnn":
        return _unserved_by_cudnn(query)
    if visibility.causal_query_mask is not None:
        return "a pattern of attention whose tokens are partly causal"
    return splash_unsupported_reason(query, key)


def _unserved_by_cudnn(query: jax.Array) -> str | None:
    _, S, _, H = query.shape
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the type {query.dtype}; bfloat16 is served"
    if H % 8 or H > 128:
        return f"head_dim={H}; multiples of 8 up to 128 are served"
    if S % 2:  # Its backward pass needs this where there is a mask.
        return f"rows of {S} positions; even lengths are served"
    return None if platform() == "gpu" else f"the platform {platform()}"
