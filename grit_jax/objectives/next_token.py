"""The generative loss: cross-entropy of the next token, a chunk of the logits at a time.

Dimensions: B rows, S positions, D hidden size, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np
import optax

from grit_jax.arithmetic import ceil_div
from grit_jax.models.layers import soft_cap
from grit_jax.objectives.pooling import sum_by_text
from grit_jax.sharding import all_gather_fsdp, mesh_axes, partition_spec, with_logical_constraint

REDUCTIONS = ("mixed", "token", "mean")


def shift_targets(
    tokens: Int[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"],
    mask: Bool[Array | np.ndarray, "B S"],
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Returns the token after each token, and whether it is a target of the loss.

    Args:
      tokens: token ids.
      segment_ids: index of each token's text in the batch, plus 1; 0 is padding.
      mask: the tokens that the model learns to generate.
    """

    def shift(values: jax.Array | np.ndarray) -> jax.Array:
        return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))

    is_target = shift(mask) & (shift(segment_ids) == segment_ids)
    return shift(tokens), is_target


def target_weights(
    reduction: str,
    is_target: Bool[Array | np.ndarray, "B S"],
    segment_ids: Int[Array | np.ndarray, "B S"],
    num_texts: int,
    group_size: int,
) -> Float[Array, "B S"]:
    """Returns the weight of each target in the loss, which is a weighted sum.

    Args:
      reduction: "mean" over all targets of the batch; "token", the sum over targets divided by the
        number of texts; or "mixed", the mean over the targets of each group of texts, then over
        groups, as data parallelism with a mean on each device computes.
      is_target: whether the token after each token is a target.
      segment_ids: index of each token's text in the batch, plus 1; 0 is padding.
      num_texts: number of texts.
      group_size: number of texts in a group of "mixed"; the last group may be smaller.

    Raises:
      ValueError: the reduction is unknown.
    """
    real = jnp.asarray(is_target, jnp.float32)
    if reduction == "token":
        return real / num_texts
    if reduction == "mean":
        return real / jnp.maximum(jnp.sum(real), 1.0)
    if reduction == "mixed":
        num_groups = ceil_div(num_texts, group_size)
        group_ids = jnp.where(segment_ids > 0, (segment_ids - 1) // group_size + 1, 0)
        targets = jnp.maximum(sum_by_text(real, group_ids, num_groups), 1.0)
        return real / (jnp.concatenate([jnp.ones(1), targets])[group_ids] * num_groups)
    raise ValueError(f"generative reduction {reduction!r} must be one of {', '.join(REDUCTIONS)}")


def next_token_loss(
    hidden: Float[Array, "B S D"],
    projection: Float[Array, "D V"],
    targets: Int[Array | np.ndarray, "B S"],
    weights: Float[Array | np.ndarray, "B S"],
    chunk_size: int | None = None,
    logits_dtype: str = "float32",
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Returns the weighted sum of the cross-entropies of `targets`, in nats and float32.

    Logits are computed for a chunk of positions at a time, and again in the backward pass.
    Positions of weight 0 are sorted to the end, and chunks that have only such positions are
    skipped.

    Args:
      hidden: hidden states.
      projection: matrix from hidden states to logits.
      targets: token id that each position predicts.
      weights: weight of each target, a constant without a gradient.
      chunk_size: positions of each row in a chunk, by default an eighth of the row, at most 256.
      logits_dtype: type of the logits.
      softcap: bound of the logits (`models.layers.soft_cap`); None for no bound.
    """
    S = hidden.shape[1]
    chunk_size = chunk_size or min(256, ceil_div(S, 8))
    weights = jax.lax.stop_gradient(weights)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def chunks(array: jax.Array | np.ndarray) -> jax.Array:
        """[B, S, ...] -> [chunks, B, chunk_size, ...], positions with a weight first."""
        index = order.reshape(order.shape + (1,) * (array.ndim - 2))
        ordered = jnp.take_along_axis(array, index, axis=1)
        padded = jnp.pad(ordered, ((0, 0), (0, -S % chunk_size)) + ((0, 0),) * (array.ndim - 2))
        split = padded.reshape(padded.shape[0], -1, chunk_size, *array.shape[2:])
        return with_logical_constraint(
            jnp.moveaxis(split, 1, 0), None, "batch", *(None,) * (array.ndim - 1)
        )

    inputs = (chunks(hidden), chunks(targets), chunks(weights))
    has_weight = jnp.any(inputs[2] != 0, axis=(1, 2))
    projection = projection.astype(hidden.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return _sum_over_chunks(projection, inputs, has_weight, logits_dtype, softcap)
    sum_on_mesh = jax.shard_map(
        functools.partial(_sum_on_mesh, logits_dtype=logits_dtype, softcap=softcap),
        in_specs=(
            partition_spec("embed", None),
            tuple(partition_spec(None, "batch", *(None,) * (x.ndim - 2)) for x in inputs),
            partition_spec(None),
        ),
        out_specs=partition_spec(),
        axis_names=set(mesh_axes("batch")),
    )
    return sum_on_mesh(projection, inputs, has_weight)


def _sum_on_mesh(
    projection: jax.Array,
    inputs: tuple[jax.Array, ...],
    has_weight: jax.Array,
    *,
    logits_dtype: str,
    softcap: float | None,
) -> Float[Array, ""]:
    """Sums over one device's rows, then over devices.

    The projection is gathered once, and its gradient reduced once, instead of once for each chunk.
    """
    whole = all_gather_fsdp(projection, axis=0)
    total = _sum_over_chunks(whole, inputs, has_weight, logits_dtype, softcap)
    return jax.lax.psum(total, mesh_axes("batch"))


def _sum_over_chunks(
    projection: Float[Array, "D V"],
    inputs: tuple[jax.Array, ...],
    has_weight: Bool[Array, " chunks"],
    logits_dtype: str,
    softcap: float | None,
) -> Float[Array, ""]:
    """Returns the weighted sum over chunks of hidden states, targets and weights.

    Chunks without any weight are skipped.
    """

    def weighted_sum(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.einsum("BSD,DV->BSV", hidden, projection, preferred_element_type=logits_dtype)
        logits = soft_cap(logits, softcap)
        logits = with_logical_constraint(logits, None, None, "vocab").astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights)

    def zero(*chunk: jax.Array) -> jax.Array:
        return jnp.zeros_like(chunk[-1], shape=())

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(total: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
        chunk, has_weight = scanned
        return total + jax.lax.cond(has_weight, weighted_sum, zero, *chunk), None

    total, _ = jax.lax.scan(add_chunk, zero(inputs[-1]), (inputs, has_weight))
    return total
