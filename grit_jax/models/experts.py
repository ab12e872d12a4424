"""Dropless mixture of experts, on one device or with the experts split over a mesh axis.

For dimensions see `grit_jax.models`. On a mesh, each device has its share of the tokens and of the
experts:

    sort copies by expert  ->  send each to its expert's device  ->  feed-forward network
    weighted sum by token  <-  send each back                    <-

No copy is dropped: buffers have room for the worst case, in which all tokens choose experts of one
device. Unused room costs memory, but no products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.grouped_matmul import exclusive_cumsum, grouped_matmul
from grit_jax.models.linear import LinearLayers, Weight, linear
from grit_jax.models.weights import WeightSpec, WeightTable
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import mesh_axes, partition_spec

# Logical axes of the experts' matrices: experts, inputs, outputs.
EXPERT_UP_AXES = ("experts", "embed", "mlp")
EXPERT_DOWN_AXES = ("experts", "mlp", "embed")

# Names (`checkpoint_name`) of the arrays that a rematerialization policy may save.
EXPERT_PRODUCTS = ("expert_inputs", "expert_gate", "expert_up", "expert_outputs")


def expert_weights(block: str, gate: str, up: str, down: str) -> WeightTable:
    """Returns the weights of a router and its experts.

    Args:
      block: name of the feed-forward network in Hugging Face checkpoints.
      gate: name of an expert's gate projection.
      up: the same.
      down: the same.
    """
    expert = f"{block}.experts.{{expert}}"
    return {
        # Small, and a rounding error would send tokens to other experts.
        "layers.feed_forward.router": WeightSpec(
            axes=("embed", "router"), name=f"{block}.gate.weight", num_inputs=1, int8=False
        ),
        "layers.feed_forward.gate": WeightSpec(
            axes=EXPERT_UP_AXES, name=f"{expert}.{gate}.weight", num_inputs=1
        ),
        "layers.feed_forward.up": WeightSpec(
            axes=EXPERT_UP_AXES, name=f"{expert}.{up}.weight", num_inputs=1
        ),
        "layers.feed_forward.down": WeightSpec(
            axes=EXPERT_DOWN_AXES, name=f"{expert}.{down}.weight", num_inputs=1, init="residual"
        ),
    }


@pytree_dataclass
class RouterStatistics:
    """Sums over the tokens of a stream, for the load-balancing loss.

    Attributes:
      choices: number of tokens that chose each expert as their first, second, ... choice.
      probabilities: sum of the probabilities of each expert.
      tokens: number of tokens, without padding.
    """

    choices: Float[Array, "*L C E"]
    probabilities: Float[Array, "*L E"]
    tokens: Float[Array, "*L"]


class Experts(LinearLayers):
    """A router and its gated feed-forward networks, as in Mixtral (arXiv 2401.04088) and Qwen3."""

    def __call__(
        self, hidden: Float[Array, "M D"], is_token: Bool[Array, " M"]
    ) -> tuple[Float[Array, "M D"], RouterStatistics]:
        """Returns the transformed states and the statistics of the router.

        Padding is sent to no expert and becomes 0.
        """
        wide, router = hidden.astype(jnp.float32), self.weight("router", "float32")
        probabilities = jax.nn.softmax(linear(wide, router))
        weights, experts = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        no_expert = self.config.num_local_experts
        output = apply_experts(
            hidden,
            weights.astype(self.config.dtype),
            jnp.where(is_token[:, None], experts, no_expert),
            self.weight("gate"),
            self.weight("up"),
            self.weight("down"),
        )
        return output, router_statistics(probabilities, experts, is_token)


def router_statistics(
    probabilities: Float[Array, "M E"], experts: Int[Array, "M C"], is_token: Bool[Array, " M"]
) -> RouterStatistics:
    """Returns the sums that the load-balancing loss needs, over all tokens but padding."""
    real = is_token.astype(jnp.float32)
    chosen = experts[..., None] == jnp.arange(probabilities.shape[-1])
    return RouterStatistics(
        # Not an einsum, which would store [M, C, E].
        choices=jnp.sum(chosen & is_token[:, None, None], axis=0, dtype=jnp.float32),
        probabilities=jnp.einsum("ME,M->E", probabilities, real),
        tokens=jnp.sum(real),
    )


def apply_experts(
    tokens: Float[Array, "M D"],
    weights: Float[Array, "M C"],
    experts: Int[Array, "M C"],
    gate: Weight,
    up: Weight,
    down: Weight,
) -> Float[Array, "M D"]:
    """Sends each token through its C experts and returns the weighted sum of their outputs.

    Args:
      tokens: hidden states.
      weights: weight of each chosen expert.
      experts: index of each chosen expert; E for none, which adds 0 and costs no product.
      gate: W [E, D, F], with the matrices of a low-rank update if there is one.
      up: the same.
      down: W [E, F, D], the same.
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
        check_vma=False,  # The kernel `tgmm` does not declare the axes that it varies over.
    )(tokens, weights, experts, gate, up, down)


def _axes(weight: Weight, axes: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """Returns the logical axes of W, and of A and B if there is a low-rank update."""
    experts, inputs, outputs = axes
    all_axes = [axes, (experts, inputs, "lora"), (experts, "lora", outputs)]
    return all_axes[: len(weight)]


def _apply_on_mesh(
    tokens: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
) -> jax.Array:
    """Applies the experts to one device's tokens, given its shards of the matrices."""

    def all_gather(matrix: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        if "embed" not in axes:
            return matrix
        return jax.lax.all_gather(matrix, mesh_axes("embed"), axis=axes.index("embed"), tiled=True)

    def whole(weight: Weight, axes: tuple[str, str, str]) -> Weight:
        pairs = zip(weight, _axes(weight, axes), strict=True)
        return tuple(all_gather(matrix, names) for matrix, names in pairs)

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
    rows = tokens[order // C]
    group_sizes = jnp.sum(experts.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)
    if axis is None or num_devices == 1:
        outputs = _feed_forward(rows, gate, up, down, group_sizes)
    else:
        plan, reverse_plan, group_sizes = plan_all_to_all(group_sizes, axis)
        max_rows = num_devices * M * min(C, num_own)
        received = ragged_all_to_all(axis, max_rows, rows, plan, reverse_plan)
        outputs = _feed_forward(received, gate, up, down, group_sizes)
        outputs = ragged_all_to_all(axis, M * C, outputs, reverse_plan, plan)
    in_token_order = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
    in_token_order = checkpoint_name(in_token_order, "expert_outputs")
    return jnp.einsum("MCD,MC->MD", in_token_order.reshape(M, C, -1), weights)


def _feed_forward(
    rows: Float[Array, "R D"],
    gate: Weight,
    up: Weight,
    down: Weight,
    group_sizes: Int[Array, " own_experts"],
) -> Float[Array, "R D"]:
    def product(rows: jax.Array, weight: Weight) -> jax.Array:
        matrix, *update = weight
        products = grouped_matmul(rows, matrix, group_sizes)
        if not update:
            return products
        a, b = update
        return products + grouped_matmul(grouped_matmul(rows, a, group_sizes), b, group_sizes)

    rows = checkpoint_name(rows, "expert_inputs")
    gate_output = checkpoint_name(product(rows, gate), "expert_gate")
    up_output = checkpoint_name(product(rows, up), "expert_up")
    return product(jax.nn.silu(gate_output) * up_output, down)


class AllToAllPlan(NamedTuple):
    """The arguments of `jax.lax.ragged_all_to_all`, for one device."""

    input_offsets: Int[Array, " slices"]
    send_sizes: Int[Array, " slices"]
    output_offsets: Int[Array, " slices"]
    recv_sizes: Int[Array, " slices"]


def plan_all_to_all(
    group_sizes: Int[Array, " E"], axis: str
) -> tuple[AllToAllPlan, AllToAllPlan, Int[Array, " own_experts"]]:
    """Plans the exchange of rows between devices, to the experts and back.

    With two devices and four experts, where "1c" is the slice that device 1 sends to expert c:

        sent      device 0: 0a 0b 0c 0d    device 1: 1a 1b 1c 1d      sorted by expert
        received  device 0: 0a 1a 0b 1b    device 1: 0c 1c 0d 1d      sorted by expert again

    Args:
      group_sizes: number of this device's rows for each expert.
      axis: the mesh axis of the experts.

    Returns:
      The plan to the experts, the plan back, and the number of rows that each of this device's
      experts receives.
    """
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    sizes = jax.lax.all_gather(group_sizes, axis)  # [devices, E]: from each device to each expert
    sent = exclusive_cumsum(sizes)
    # [from, E] -> [to, own experts, from]: the order of the rows that a device receives.
    by_receiver = sizes.reshape(num_devices, num_devices, -1).transpose(1, 2, 0)
    kept = exclusive_cumsum(by_receiver.reshape(num_devices, -1)).reshape(by_receiver.shape)
    kept = kept.transpose(2, 0, 1).reshape(sizes.shape)

    def to_own_experts(of_slices: jax.Array) -> jax.Array:
        own = of_slices.reshape(num_devices, num_devices, -1)[:, device]
        return own.reshape(-1)

    plan = AllToAllPlan(sent[device], sizes[device], kept[device], to_own_experts(sizes))
    reverse_plan = AllToAllPlan(
        to_own_experts(kept), to_own_experts(sizes), to_own_experts(sent), sizes[device]
    )
    return plan, reverse_plan, jnp.sum(by_receiver[device], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ragged_all_to_all(
    axis: str,
    num_rows: int,
    rows: Float[Array, "R D"],
    plan: AllToAllPlan,
    reverse_plan: AllToAllPlan,
) -> Float[Array, "_ D"]:
    """Returns the rows that the devices along `axis` send to this one, followed by zeros.

    The gradient follows `reverse_plan`.
    """
    received = jnp.zeros_like(rows, shape=(num_rows, rows.shape[1]))
    return jax.lax.platform_dependent(
        rows,
        received,
        *plan,
        cpu=functools.partial(ragged_all_to_all_on_cpu, axis=axis),
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis),
    )


def _all_to_all_forward(axis, num_rows, rows, plan, reverse_plan):
    received = ragged_all_to_all(axis, num_rows, rows, plan, reverse_plan)
    return received, (rows.shape[0], plan, reverse_plan)


def _all_to_all_backward(axis, num_rows, saved, gradient):
    del num_rows
    sent_rows, plan, reverse_plan = saved
    return ragged_all_to_all(axis, sent_rows, gradient, reverse_plan, plan), None, None


ragged_all_to_all.defvjp(_all_to_all_forward, _all_to_all_backward)


def ragged_all_to_all_on_cpu(
    rows: Float[Array, "R D"],
    output: Float[Array, "received D"],
    input_offsets: Int[Array, " slices"],
    send_sizes: Int[Array, " slices"],
    output_offsets: Int[Array, " slices"],
    recv_sizes: Int[Array, " slices"],
    *,
    axis: str,
) -> Float[Array, "received D"]:
    """CPU fallback for `jax.lax.ragged_all_to_all`: all-gathers the rows and selects this device's.

    XLA has no ragged all-to-all for CPUs.
    """
    del recv_sizes
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)

    def to_this_device(of_slices: jax.Array) -> jax.Array:
        gathered = jax.lax.all_gather(of_slices, axis)
        return gathered.reshape(num_devices, num_devices, -1)[:, device].reshape(-1)

    sources = jnp.repeat(jnp.arange(num_devices), len(send_sizes) // num_devices)
    sources = sources * len(rows) + to_this_device(input_offsets)
    offsets = jnp.arange(len(output))[:, None] - to_this_device(output_offsets)
    is_within = (offsets >= 0) & (offsets < to_this_device(send_sizes))  # [received, E]
    source = jnp.sum(jnp.where(is_within, sources + offsets, 0), axis=1)
    gathered = jax.lax.all_gather(rows, axis, tiled=True)
    return jnp.where(jnp.any(is_within, axis=1)[:, None], gathered[source], output)
