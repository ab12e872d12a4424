"""Splash attention, the block-sparse attention kernel for TPUs that comes with JAX.

Legend of dimensions: B rows, S positions, N query heads, K key/value heads, H head dimension.
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.sharding import partition_spec, platform, shards

# Positions in a block are a multiple of this: a row of the machine's registers has so many lanes.
LANES = 128


def splash_unsupported_reason(query: Float[Array, "B S N H"], key: Float[Array, "B S K H"]) -> str | None:
    """Returns what it is in a case that `splash_attention` does not serve; None: it serves it."""
    B, S, N, _ = query.shape
    if S % LANES:
        return f"rows of {S} positions; multiples of {LANES} are served"
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
    segment_ids: Int[Array, "B S"],
    *,
    is_causal: bool,
    sliding_window: int | None,
    block_size: int,
) -> Float[Array, "B S N H"]:
    """Attention within each segment of a row, causal or within a window by places in the row.

    Within a segment, places differ as positions do. The kernel walks over blocks of `block_size`
    positions at most. On a CPU it is interpreted.
    """

    def attend(query, key, value, segment_ids):
        _, S, N, H = query.shape
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([_mask(S, is_causal, sliding_window)] * N),
            block_sizes=_block_sizes(largest_block(S, block_size)),
            head_shards=1,
            q_seq_shards=1,
            interpret=platform() == "cpu",
        )
        # [B, S, heads, H] -> [B, heads, S, H]
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * H**-0.5, key, value))
        mixed = jax.vmap(kernel)(query, key, value, splash.SegmentIds(segment_ids, segment_ids))
        return jnp.swapaxes(mixed, 1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(query, key, value, segment_ids)
    # The compiler cannot split a kernel, but rows and heads do not meet in it.
    queries = partition_spec("batch", None, "heads", "head_dim")
    keys = partition_spec("batch", None, "kv_heads", "head_dim")
    return jax.shard_map(
        attend,
        in_specs=(queries, keys, keys, partition_spec("batch", None)),
        out_specs=queries,
        check_vma=False,
    )(query, key, value, segment_ids)


def _mask(S: int, is_causal: bool, sliding_window: int | None) -> splash.Mask:
    if sliding_window is not None:
        before, after = sliding_window - 1, 0 if is_causal else sliding_window - 1
        return splash.LocalMask((S, S), (before, after), offset=0)
    return splash.CausalMask((S, S)) if is_causal else splash.FullMask((S, S))


def largest_block(S: int, block_size: int) -> int:
    """Returns the largest block of `block_size` positions at most that divides a row of S."""
    sizes = range(LANES, min(S, block_size) + 1, LANES)
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
