"""Products of rows with the matrix of their group, as experts need them.

The rows of a group are contiguous. For dimensions see `grit_jax.models`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.arithmetic import ceil_div

# Rows of a block of the loop: enough to be worth loading an expert's matrix for.
BLOCK_ROWS = 128

# Rows, inputs and outputs of a tile of the TPU kernel. The number of rows must be a multiple of the
# tile's.
TILE = (512, 1024, 1024)
MIN_TILE_ROWS = 128


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "R inputs"],
    weights: Float[Array, "E inputs outputs"],
    group_sizes: Int[Array, " E"],
) -> Float[Array, "R outputs"]:
    """Returns each row times the matrix of its group; rows after the last group become 0.

    It is `jax.lax.ragged_dot` on TPUs, which have a kernel for it. Elsewhere XLA would expand that
    to products with all E matrices, so a loop over blocks of rows computes only what is needed.
    """
    return jax.lax.platform_dependent(
        rows, weights, group_sizes, tpu=_ragged_product, default=_block_product
    )


def _grouped_matmul_forward(rows, weights, group_sizes):
    return grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _grouped_matmul_backward(saved, gradient):
    rows_gradient, weights_gradient = jax.lax.platform_dependent(
        *saved, gradient, tpu=_ragged_gradients, default=_block_gradients
    )
    return rows_gradient, weights_gradient, None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def exclusive_cumsum(sizes: Int[Array, "*axes E"]) -> Int[Array, "*axes E"]:
    """Returns where each group starts."""
    return jnp.cumsum(sizes, axis=-1) - sizes


def _ragged_product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    products = jax.lax.ragged_dot(rows, weights, group_sizes)
    # `ragged_dot` leaves rows after the last group undefined.
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), products, 0)


def _ragged_gradients(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_gradient = _ragged_product(gradient, jnp.swapaxes(weights, 1, 2), group_sizes)
    # XLA would compute the gradient of `ragged_dot`'s weights with products of all groups' rows.
    padding = ((0, -len(rows) % MIN_TILE_ROWS), (0, 0))
    rows, gradient = jnp.pad(rows, padding), jnp.pad(gradient, padding)
    tiling = (math.gcd(len(rows), TILE[0]), *TILE[1:])
    weights_gradient = tgmm(rows.T, gradient, group_sizes, weights.dtype, tiling)
    return rows_gradient, weights_gradient


class _Block(NamedTuple):
    """Consecutive rows, the first of which belong to one group."""

    expert: Int[Array, ""]
    start: Int[Array, ""]
    is_row: Bool[Array, "R 1"]  # Whether a row belongs to the group.


def _block(index: jax.Array, group_sizes: jax.Array, block_rows: int) -> _Block:
    blocks = ceil_div(group_sizes, block_rows)
    expert = jnp.searchsorted(jnp.cumsum(blocks), index, side="right")
    offset = (index - exclusive_cumsum(blocks)[expert]) * block_rows
    is_row = jnp.arange(block_rows) < group_sizes[expert] - offset
    return _Block(expert, exclusive_cumsum(group_sizes)[expert] + offset, is_row[:, None])


def _num_blocks(group_sizes: jax.Array, block_rows: int) -> jax.Array:
    return jnp.sum(ceil_div(group_sizes, block_rows))


def _block_product(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    subscripts: str = "RI,IO->RO",
    num_outputs: int | None = None,
) -> jax.Array:
    block_rows = min(BLOCK_ROWS, len(rows))
    padded = jnp.pad(rows, ((0, block_rows), (0, 0)))

    def write_block(index: jax.Array, output: jax.Array) -> jax.Array:
        block = _block(index, group_sizes, block_rows)
        block_inputs = jax.lax.dynamic_slice_in_dim(padded, block.start, block_rows)
        product = jnp.einsum(subscripts, block_inputs, weights[block.expert])
        # Rows after the group's end are 0 here; the next group overwrites them.
        product = jnp.where(block.is_row, product, 0)
        return jax.lax.dynamic_update_slice_in_dim(output, product, block.start, axis=0)

    output = jnp.zeros_like(padded, shape=(len(padded), num_outputs or weights.shape[2]))
    blocks = _num_blocks(group_sizes, block_rows)
    return jax.lax.fori_loop(0, blocks, write_block, output)[: len(rows)]


def _block_gradients(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    block_rows = min(BLOCK_ROWS, len(rows))
    padding = ((0, block_rows), (0, 0))
    padded_rows, padded_gradient = jnp.pad(rows, padding), jnp.pad(gradient, padding)

    def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
        block = _block(index, group_sizes, block_rows)
        block_inputs = jax.lax.dynamic_slice_in_dim(padded_rows, block.start, block_rows)
        block_gradient = jax.lax.dynamic_slice_in_dim(padded_gradient, block.start, block_rows)
        product = jnp.einsum(
            "RI,RO->IO",
            jnp.where(block.is_row, block_inputs, 0),
            block_gradient,
            preferred_element_type=total.dtype,
        )
        return jax.lax.dynamic_update_index_in_dim(
            total, total[block.expert] + product, block.expert, axis=0
        )

    total = jnp.zeros_like(weights, dtype=jnp.float32)
    total = jax.lax.fori_loop(0, _num_blocks(group_sizes, block_rows), add_block, total)
    rows_gradient = _block_product(gradient, weights, group_sizes, "RO,IO->RI", weights.shape[1])
    return rows_gradient, total.astype(weights.dtype)
