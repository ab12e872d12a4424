"""Attention over packed rows: the mask, and its implementations for CPU, TPU and GPU.

For dimensions see `grit_jax.models`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from grit_jax.models.config import SPLASH_LANES
from grit_jax.sharding import partition_spec, platform, shards

# The implementation that "auto" prefers on a platform; "xla" everywhere else.
PREFERRED = {"tpu": "splash"}


class AttentionError(ValueError):
    """The chosen implementation of attention does not support the case."""


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to.

    A query attends to keys of its own segment. A causal query attends only to itself and to earlier
    positions. A sliding window further limits the distance of keys (see `window_size`). Padding
    (segment 0) attends to padding, so that no query is without a key.

    A row with a text of three tokens, a text of two and one padding token, first with `is_causal`,
    then with the first two tokens as `causal_query_mask`:

        segment    1 1 1 2 2 0        1 1 1 2 2 0
        1          x                  x
        1          x x                x x
        1          x x x              x x x
        2                x                  x x
        2                x x                x x
        0                    x                  x

    Attributes:
      segment_ids: ID of each query's text, from 1 on and unique within the row; 0 is padding.
      positions: position of each query in its text.
      is_causal: whether all queries are causal.
      causal_query_mask: queries that are causal even if `is_causal` is False.
      sliding_window: the window of transformers' configurations; None for no limit.
      is_sliding: whether the window applies: an array in a scan over layers that differ.
      key_segment_ids: segment ids of the keys in a cache; None if the keys are the queries' own.
      key_positions: positions of the keys in a cache.
    """

    segment_ids: Int[Array | np.ndarray, "B S"]
    positions: Int[Array | np.ndarray, "B S"]
    is_causal: bool
    causal_query_mask: Bool[Array | np.ndarray, "B S"] | None = None
    sliding_window: int | None = None
    is_sliding: bool | Bool[Array, ""] = True
    key_segment_ids: Int[Array | np.ndarray, "B T"] | None = None
    key_positions: Int[Array | np.ndarray, "B T"] | None = None

    @property
    def has_cache(self) -> bool:
        """Whether the keys are those of a cache."""
        return self.key_segment_ids is not None

    def as_array(self) -> Bool[Array | np.ndarray, "B S T"]:
        """Returns whether each query attends to each key."""
        key_segment_ids, key_positions = self.key_segment_ids, self.key_positions
        if key_segment_ids is None or key_positions is None:
            key_segment_ids, key_positions = self.segment_ids, self.positions
        distance = self.positions[:, :, None] - key_positions[:, None, :]
        is_same_segment = self.segment_ids[:, :, None] == key_segment_ids[:, None, :]
        in_reach = self._in_reach(distance, self.is_causal)
        if not self.is_causal and self.causal_query_mask is not None:
            in_reach_causally = self._in_reach(distance, True)
            in_reach = jnp.where(self.causal_query_mask[:, :, None], in_reach_causally, in_reach)
        return is_same_segment & in_reach

    def _in_reach(
        self, distance: Int[Array | np.ndarray, "B S T"], is_causal: bool
    ) -> Bool[Array | np.ndarray, "B S T"] | bool:
        """Returns whether keys are at a permitted distance before (or, if negative, after)."""
        everywhere = distance >= 0 if is_causal else True
        if self.sliding_window is None or self.is_sliding is False:
            return everywhere
        before, after = window_size(self.sliding_window, is_causal)
        in_window = (distance <= before) & (distance >= -after)
        return in_window if self.is_sliding is True else in_window | (everywhere & ~self.is_sliding)


def window_size(sliding_window: int, is_causal: bool) -> tuple[int, int]:
    """Returns how many keys before and after itself a query attends to, as FlashAttention takes it.

    As in transformers, a causal window counts the query itself, and a bidirectional window does
    not: it reaches `sliding_window` positions in both directions.
    """
    return (sliding_window - 1, 0) if is_causal else (sliding_window, sliding_window)


def attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: AttentionMask,
    implementation: str = "auto",
    splash_block_size: int = 1024,
    scale: float | None = None,
) -> Float[Array, "B S N H"]:
    """Softmax attention. Each key head serves N/K query heads.

    Scores and softmax are in float32.

    Args:
      query: queries.
      key: keys.
      value: values.
      mask: which keys each query attends to.
      implementation: "xla" supports every case. "splash" is the block-sparse Pallas kernel for TPUs
        (interpreted, and slow, on a CPU); it masks by index in the row, so positions must rise by
        one within a segment. "cudnn" is the kernel for NVIDIA GPUs. "auto" is "splash" on a TPU
        where it supports the case, else "xla".
      splash_block_size: maximum block size of the splash kernel, in positions.
      scale: what scores are multiplied by; None for 1/sqrt(H).

    Raises:
      AttentionError: the chosen implementation does not support the case.
    """
    if implementation == "auto":
        kernel = PREFERRED.get(platform(), "xla")
        implementation = "xla" if _unsupported_reason(kernel, query, key, mask) else kernel
    elif reason := _unsupported_reason(implementation, query, key, mask):
        raise AttentionError(
            f"config.model.attention_implementation={implementation!r} does not support {reason}; "
            "use 'auto'"
        )
    if implementation == "splash":
        return splash_attention(query, key, value, mask, splash_block_size, scale)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask.as_array()[:, None],  # [B, S, T] -> [B, 1, S, T]
        scale=scale,
        implementation=cast(Any, implementation),
    )


def _unsupported_reason(
    implementation: str, query: jax.Array, key: jax.Array, mask: AttentionMask
) -> str | None:
    """Returns why `implementation` cannot handle this case, or None if it can."""
    if implementation == "xla":
        return None
    if mask.has_cache:
        return "a cache"
    if implementation == "cudnn":
        return _unsupported_by_cudnn(query)
    if mask.causal_query_mask is not None:
        return "a pattern of attention whose tokens are partly causal"
    return _unsupported_by_splash(query, key)


def _unsupported_by_cudnn(query: jax.Array) -> str | None:
    _, S, _, H = query.shape
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the type {query.dtype}, only bfloat16"
    if H % 8 or H > 128:
        return f"head_dim={H}, only multiples of 8 up to 128"
    if S % 2:  # With a mask, its backward pass requires this.
        return f"rows of {S} positions, only even lengths"
    return None if platform() == "gpu" else f"the platform {platform()}"


def _unsupported_by_splash(query: jax.Array, key: jax.Array) -> str | None:
    B, S, N, _ = query.shape
    if S % SPLASH_LANES:
        return f"rows of {S} positions, only multiples of {SPLASH_LANES}"
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {"batch": B, "heads": N, "kv_heads": key.shape[2]}
    for axis, size in sizes.items():
        if not mesh.empty and size % shards(mesh, axis):
            return f"an axis {axis!r} of size {size} on {shards(mesh, axis)} shards"
    return None if platform() in ("tpu", "cpu") else f"the platform {platform()}"


def splash_attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    max_block_size: int,
    scale: float | None = None,
) -> Float[Array, "B S N H"]:
    """Splash attention, the block-sparse Pallas kernel for TPUs that JAX ships.

    The kernel masks by index in the row. Within a segment, indices differ as positions do. Its mask
    is a constant, so layers that differ have two kernels, and run one.
    """
    if isinstance(mask.is_sliding, jax.Array):
        sliding, full = (
            functools.partial(
                splash_attention,
                mask=dataclasses.replace(mask, is_sliding=is_sliding),
                max_block_size=max_block_size,
                scale=scale,
            )
            for is_sliding in (True, False)
        )
        return jax.lax.cond(mask.is_sliding, sliding, full, query, key, value)
    is_causal = mask.is_causal
    sliding_window = mask.sliding_window if mask.is_sliding else None

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        _, S, N, H = query.shape
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([_splash_mask(S, is_causal, sliding_window)] * N),
            block_sizes=_block_sizes(largest_block(S, max_block_size)),
            head_shards=1,
            q_seq_shards=1,
            interpret=platform() == "cpu",
        )
        # [B, S, heads, H] -> [B, heads, S, H]
        query *= scale or H**-0.5
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(segment_ids, segment_ids))
        return jnp.swapaxes(cast(jax.Array, mixed), 1, 2)

    segment_ids = jnp.asarray(mask.segment_ids)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(query, key, value, segment_ids)
    # XLA cannot partition a kernel, but rows and heads are independent in it.
    queries = partition_spec("batch", None, "heads", "head_dim")
    keys = partition_spec("batch", None, "kv_heads", "head_dim")
    return jax.shard_map(
        attend,
        in_specs=(queries, keys, keys, partition_spec("batch", None)),
        out_specs=queries,
        check_vma=False,
    )(query, key, value, segment_ids)


def _splash_mask(S: int, is_causal: bool, sliding_window: int | None) -> Any:
    if sliding_window is not None:
        return splash.LocalMask((S, S), window_size(sliding_window, is_causal), offset=0)
    return splash.CausalMask((S, S)) if is_causal else splash.FullMask((S, S))


def largest_block(S: int, max_block_size: int) -> int:
    """Returns the largest block size up to `max_block_size` that divides a row of S positions."""
    sizes = range(SPLASH_LANES, min(S, max_block_size) + 1, SPLASH_LANES)
    return max(size for size in sizes if S % size == 0)


def _block_sizes(block: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
