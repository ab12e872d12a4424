"""Tokens to their experts and back, on one device or on a mesh whose devices share the experts.

Legend of dimensions: M tokens, D hidden, F feed-forward, E experts, C experts chosen for a token,
R rows (copies of tokens, one for each choice), K inputs and N outputs of a weight, P devices along
the mesh axis of the experts. The weights of an adapted layer (`linear.Weight`) have a pair of
matrices, A and B, for each expert.

On a mesh each device holds M/P tokens and E/P experts:

    sort copies by expert  ->  send each to its expert's device  ->  feed-forward network
    weighted sum by token  <-  send each back                    <-

No copy is dropped: arrays have room for the worst case, that all copies choose one device's
experts, and the room that is left costs memory but no products.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.linear import Weight
from grit_jax.sharding import mesh_axes, partition_spec

# Rows that one product of the loop takes: enough to be worth reading an expert's weight for.
BLOCK_ROWS = 128

# Rows, inputs and outputs of a tile of the kernel for TPUs; rows must be a multiple of the tile's.
TILE = (512, 1024, 1024)
MIN_TILE_ROWS = 128

# Names of the axes of the experts' weights: experts, inputs, outputs.
EXPERT_UP_AXES = ("experts", "embed", "mlp")
EXPERT_DOWN_AXES = ("experts", "mlp", "embed")

# What a policy of rematerialisation may save, by `checkpoint_name`.
EXPERT_PRODUCTS = ("expert_inputs", "expert_gate", "expert_up", "expert_outputs")


def apply_experts(
    tokens: Float[Array, "M D"],
    weights: Float[Array, "M C"],
    experts: Int[Array, "M C"],
    gate: Weight,
    up: Weight,
    down: Weight,
) -> Float[Array, "M D"]:
    """Sends each token through its C experts and returns the weighted sum of their outputs.

    The W of `gate` and `up` are [E, D, F], that of `down` [E, F, D]. The choice E stands for none:
    it costs no product and adds 0. With a mesh in use, the tokens lie on it as "batch" does, and
    each device computes what was sent to the experts it holds.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _apply(tokens, weights, experts, gate, up, down, axis=None)
    batch = partition_spec("batch", None)
    matrices = ((gate, EXPERT_UP_AXES), (up, EXPERT_UP_AXES), (down, EXPERT_DOWN_AXES))
    specs = [tuple(partition_spec(*a) for a in _axes(weight, axes)) for weight, axes in matrices]
    return jax.shard_map(
        _apply_on_mesh,
        in_specs=(batch, batch, batch, *specs),
        out_specs=batch,
        check_vma=False,  # The kernel for the weights' gradient does not say over what it varies.
    )(tokens, weights, experts, gate, up, down)


def _axes(weight: Weight, axes: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """Returns the names of the axes of W, and of A and B where there are any."""
    experts, inputs, outputs = axes
    of_each = [axes, (experts, inputs, "lora"), (experts, "lora", outputs)]
    return of_each[: len(weight)]


def _apply_on_mesh(
    tokens: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
) -> jax.Array:
    """What each device does with its tokens and its shards of the weights."""

    def gathered(matrix: jax.Array, *axes: str) -> jax.Array:
        if "embed" in axes:
            dimension = axes.index("embed")
            matrix = jax.lax.all_gather(matrix, mesh_axes("embed"), axis=dimension, tiled=True)
        return matrix

    def whole(weight: Weight, axes: tuple[str, str, str]) -> Weight:
        pairs = zip(weight, _axes(weight, axes), strict=True)
        return tuple(gathered(matrix, *names) for matrix, names in pairs)

    mixed = _apply(
        tokens,
        weights,
        experts,
        whole(gate, EXPERT_UP_AXES),
        whole(up, EXPERT_UP_AXES),
        whole(down, EXPERT_DOWN_AXES),
        axis=mesh_axes("experts")[0],
    )
    return jax.lax.psum(mixed, mesh_axes("mlp"))


def _apply(
    tokens: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    *,
    axis: str | None,
) -> jax.Array:
    M, C = experts.shape
    num_devices = 1 if axis is None else jax.lax.axis_size(axis)
    num_own = len(gate[0])
    E = num_devices * num_own
    order = jnp.argsort(experts.reshape(-1), stable=True)  # Copy m * C + c is token m's choice c.
    copies = tokens[order // C]
    group_sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)
    if axis is None or num_devices == 1:
        outputs = _feed_forward(copies, gate, up, down, group_sizes)
    else:
        there, back, group_sizes = plan_all_to_all(group_sizes, axis)
        most = num_devices * M * min(C, num_own)
        received = ragged_all_to_all(axis, most, copies, there, back)
        outputs = _feed_forward(received, gate, up, down, group_sizes)
        outputs = ragged_all_to_all(axis, M * C, outputs, back, there)
    in_token_order = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
    in_token_order = checkpoint_name(in_token_order, "expert_outputs")
    return jnp.einsum("MCD,MC->MD", in_token_order.reshape(M, C, -1), weights)


def _feed_forward(
    rows: Float[Array, "R D"],
    gate: Weight,
    up: Weight,
    down: Weight,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "R D"]:
    def product(rows: jax.Array, weight: Weight) -> jax.Array:
        matrix, *update = weight
        products = grouped_matmul(rows, matrix, group_sizes)
        if not update:
            return products
        a, b = update
        return products + grouped_matmul(grouped_matmul(rows, a, group_sizes), b, group_sizes)

    rows = checkpoint_name(rows, "expert_inputs")
    gated = checkpoint_name(product(rows, gate), "expert_gate")
    raised = checkpoint_name(product(rows, up), "expert_up")
    return product(jax.nn.silu(gated) * raised, down)


class AllToAllPlan(NamedTuple):
    """Which slices of rows go where, for each device: the arguments of `ragged_all_to_all`."""

    input_offsets: Int[Array, " E"]
    send_sizes: Int[Array, " E"]
    output_offsets: Int[Array, " E"]
    recv_sizes: Int[Array, " E"]


def plan_all_to_all(
    group_sizes: Int[Array, " E"], axis: str
) -> tuple[AllToAllPlan, AllToAllPlan, Int[Array, " E/P"]]:
    """Returns the routes to the experts' devices and back, and the rows that each own expert gets.

    Two devices, four experts; a slice "1c" is what device 1 sends to expert c:

        sent      device 0: 0a 0b 0c 0d    device 1: 1a 1b 1c 1d      sorted by expert
        received  device 0: 0a 1a 0b 1b    device 1: 0c 1c 0d 1d      sorted by expert again

    Args:
      group_sizes: how many of this device's rows go to each expert.
      axis: the mesh axis of the experts.
    """
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    sizes = jax.lax.all_gather(group_sizes, axis)  # [P, E]: from each device to each expert
    sent = _starts(sizes)
    # [from P, E] -> [to P, E/P x from P]: the order in which a device keeps what it receives.
    by_receiver = sizes.reshape(num_devices, num_devices, -1).transpose(1, 2, 0)
    kept = _starts(by_receiver.reshape(num_devices, -1)).reshape(by_receiver.shape)
    kept = kept.transpose(2, 0, 1).reshape(sizes.shape)

    def to_own_experts(of_slices: jax.Array) -> jax.Array:
        own = of_slices.reshape(num_devices, num_devices, -1)[:, device]
        return own.reshape(-1)

    there = AllToAllPlan(sent[device], sizes[device], kept[device], to_own_experts(sizes))
    back = AllToAllPlan(to_own_experts(kept), to_own_experts(sizes), to_own_experts(sent), sizes[device])
    return there, back, jnp.sum(by_receiver[device], axis=1)


def _starts(sizes: Int[Array, "... E"]) -> Int[Array, "... E"]:
    return jnp.cumsum(sizes, axis=-1) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged_all_to_all(
    axis: str, num_rows: int, rows: Float[Array, "R D"], there: AllToAllPlan, back: AllToAllPlan
) -> Float[Array, "num_rows D"]:
    """Returns the rows that the devices along `axis` send to this one, and zeros after them.

    The gradient takes the same way `back`.
    """
    received = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return jax.lax.platform_dependent(
        rows,
        received,
        *there,
        cpu=functools.partial(ragged_all_to_all_on_cpu, axis=axis),
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis),
    )


def _exchange_forward(axis, num_rows, rows, there, back):
    return ragged_all_to_all(axis, num_rows, rows, there, back), (rows.shape[0], there, back)


def _exchange_backward(axis, num_rows, saved, gradient):
    del num_rows
    sent_rows, there, back = saved
    return ragged_all_to_all(axis, sent_rows, gradient, back, there), None, None


ragged_all_to_all.defvjp(_exchange_forward, _exchange_backward)


def ragged_all_to_all_on_cpu(
    rows: Float[Array, "R D"],
    output: Float[Array, "num_rows D"],
    input_offsets: Int[Array, " E"],
    send_sizes: Int[Array, " E"],
    output_offsets: Int[Array, " E"],
    recv_sizes: Int[Array, " E"],
    *,
    axis: str,
) -> Float[Array, "num_rows D"]:
    """`jax.lax.ragged_all_to_all`, which XLA has not for CPUs, by gathering all devices' rows."""
    del recv_sizes
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)

    def to_this_device(of_slices: jax.Array) -> jax.Array:
        gathered = jax.lax.all_gather(of_slices, axis)
        return gathered.reshape(num_devices, num_devices, -1)[:, device].reshape(-1)

    sources = jnp.repeat(jnp.arange(num_devices), len(send_sizes) // num_devices)
    sources = sources * len(rows) + to_this_device(input_offsets)
    places = jnp.arange(len(output))[:, None] - to_this_device(output_offsets)
    is_within = (places >= 0) & (places < to_this_device(send_sizes))  # [num_rows, E]
    source = jnp.sum(jnp.where(is_within, sources + places, 0), axis=1)
    gathered = jax.lax.all_gather(rows, axis, tiled=True)
    return jnp.where(jnp.any(is_within, axis=1)[:, None], gathered[source], output)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "R K"], weights: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R N"]:
    """Returns rows times the weight of their group; rows after the last group give 0.

    `jax.lax.ragged_dot` where the platform has a kernel for it. Elsewhere XLA expands that to a
    product with all E weights; a loop over blocks of rows does only what is needed.
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


def _ragged_product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _in_groups(jax.lax.ragged_dot(rows, weights, group_sizes), group_sizes)


def _ragged_gradients(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows_gradient = _ragged_product(gradient, jnp.swapaxes(weights, 1, 2), group_sizes)
    # XLA makes the gradient of `ragged_dot`'s weights of products with every group's rows.
    padding = ((0, -len(rows) % MIN_TILE_ROWS), (0, 0))
    rows, gradient = jnp.pad(rows, padding), jnp.pad(gradient, padding)
    tiling = (math.gcd(len(rows), TILE[0]), *TILE[1:])
    weights_gradient = tgmm(rows.T, gradient, group_sizes, weights.dtype, tiling)
    return rows_gradient, weights_gradient


def _in_groups(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Sets rows after the last group to 0: `ragged_dot` does not say what they hold."""
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), rows, 0)


class Block(NamedTuple):
    """Some rows of one group; those past its end belong to the next group, or to none."""

    expert: Int[Array, ""]
    start: Int[Array, ""]
    is_row: Bool[Array, "R 1"]


def _block(index: jax.Array, group_sizes: jax.Array, block_rows: int) -> Block:
    blocks = -(-group_sizes // block_rows)
    expert = jnp.searchsorted(jnp.cumsum(blocks), index, side="right")
    offset = (index - _starts(blocks)[expert]) * block_rows
    is_row = jnp.arange(block_rows) < group_sizes[expert] - offset
    return Block(expert, _starts(group_sizes)[expert] + offset, is_row[:, None])


def _num_blocks(group_sizes: jax.Array, block_rows: int) -> jax.Array:
    return jnp.sum(-(-group_sizes // block_rows))


def _block_product(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    subscripts: str = "RK,KN->RN",
    num_outputs: int | None = None,
) -> jax.Array:
    block_rows = min(BLOCK_ROWS, len(rows))
    padded = jnp.pad(rows, ((0, block_rows), (0, 0)))

    def write_block(index: jax.Array, output: jax.Array) -> jax.Array:
        block = _block(index, group_sizes, block_rows)
        taken = jax.lax.dynamic_slice_in_dim(padded, block.start, block_rows)
        product = jnp.einsum(subscripts, taken, weights[block.expert])
        # What is past the group's end is 0 here, and the next group writes over it.
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
        taken = jax.lax.dynamic_slice_in_dim(padded_rows, block.start, block_rows)
        of_block = jax.lax.dynamic_slice_in_dim(padded_gradient, block.start, block_rows)
        product = jnp.einsum(
            "RK,RN->KN",
            jnp.where(block.is_row, taken, 0),
            of_block,
            preferred_element_type=total.dtype,
        )
        return jax.lax.dynamic_update_index_in_dim(
            total, total[block.expert] + product, block.expert, axis=0
        )

    total = jnp.zeros_like(weights, dtype=jnp.float32)
    total = jax.lax.fori_loop(0, _num_blocks(group_sizes, block_rows), add_block, total)
    rows_gradient = _block_product(gradient, weights, group_sizes, "RN,KN->RK", weights.shape[1])
    return rows_gradient, total.astype(weights.dtype)
