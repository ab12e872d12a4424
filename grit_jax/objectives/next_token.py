"""The generative loss of GRIT: cross-entropy of the next token, without ever holding the logits.

Legend of dimensions: B rows, S positions, D hidden, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.objectives.pooling import sum_by_text
from grit_jax.sharding import all_gather_fsdp, mesh_axes, partition_spec, with_logical_constraint

REDUCTIONS = ("mixed", "token", "mean")


def shift_targets(
    tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """Returns what follows each token, and whether it is to be learned.

    Args:
      tokens: token ids.
      segment_ids: number of each token's text plus 1; 0 is padding.
      mask: the tokens that the model should learn to produce.
    """

    def following(values: jax.Array) -> jax.Array:
        return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))

    is_target = following(mask) & (following(segment_ids) == segment_ids)
    return following(tokens), is_target


def target_weights(
    reduction: str,
    is_target: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    num_texts: int,
    group_size: int,
) -> Float[Array, "B S"]:
    """Returns the weight of each target in the loss; the loss is their weighted sum.

    Args:
      reduction: "mean" over the targets of the batch; "token", the sum over targets divided by the
        number of texts; or "mixed", the mean over the targets of each group of texts, then over
        the groups, which is what data parallelism with a mean on each device amounts to.
      is_target: where a token is to be learned.
      segment_ids: number of each token's text plus 1; 0 is padding.
      num_texts: number of texts.
      group_size: number of texts in a group of "mixed"; the last group may be smaller.

    Raises:
      ValueError: the reduction is unknown.
    """
    real = is_target.astype(jnp.float32)
    if reduction == "token":
        return real / num_texts
    if reduction == "mean":
        return real / jnp.maximum(jnp.sum(real), 1.0)
    if reduction == "mixed":
        num_groups = -(-num_texts // group_size)
        group_ids = jnp.where(segment_ids > 0, (segment_ids - 1) // group_size + 1, 0)
        targets = jnp.maximum(sum_by_text(real, group_ids, num_groups), 1.0)
        return real / (jnp.concatenate([jnp.ones(1), targets])[group_ids] * num_groups)
    raise ValueError(f"generative reduction {reduction!r} must be one of {', '.join(REDUCTIONS)}")


def next_token_loss(
    hidden: Float[Array, "B S D"],
    projection: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk_size: int | None = None,
    logits_dtype: str = "float32",
) -> Float[Array, ""]:
    """Returns the weighted sum of the cross-entropies of `targets`, in float32 nats.

    The logits, of the type `logits_dtype`, exist for `chunk_size` positions of each row at a time
    (an eighth of the row, at most 256), and are computed again in the backward pass. Positions of
    weight 0 come last and cost nothing where they fill a chunk; weights are constants, without a
    gradient.
    """
    S = hidden.shape[1]
    chunk_size = chunk_size or min(256, -(-S // 8))
    weights = jax.lax.stop_gradient(weights)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def chunks(array: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, B, chunk_size, ...], positions that count first."""
        index = order.reshape(order.shape + (1,) * (array.ndim - 2))
        ordered = jnp.take_along_axis(array, index, axis=1)
        padded = jnp.pad(ordered, ((0, 0), (0, -S % chunk_size)) + ((0, 0),) * (array.ndim - 2))
        split = padded.reshape(padded.shape[0], -1, chunk_size, *array.shape[2:])
        return with_logical_constraint(
            jnp.moveaxis(split, 1, 0), None, "batch", *(None,) * (array.ndim - 1)
        )

    inputs = (chunks(hidden), chunks(targets), chunks(weights))
    counts = jnp.any(inputs[2] != 0, axis=(1, 2))
    projection = projection.astype(hidden.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return _sum_over_chunks(projection, inputs, counts, logits_dtype)
    sum_on_mesh = jax.shard_map(
        functools.partial(_sum_on_mesh, logits_dtype=logits_dtype),
        in_specs=(
            partition_spec("embed", None),
            tuple(partition_spec(None, "batch", *(None,) * (x.ndim - 2)) for x in inputs),
            partition_spec(None),
        ),
        out_specs=partition_spec(),
        axis_names=set(mesh_axes("batch")),
    )
    return sum_on_mesh(projection, inputs, counts)


def _sum_on_mesh(
    projection: jax.Array,
    inputs: tuple[jax.Array, ...],
    counts: jax.Array,
    *,
    logits_dtype: str,
) -> Float[Array, ""]:
    """Returns the sum over all devices, each of which takes its own rows.

    So the projection is gathered once, and its gradient reduced once, and not for every chunk.
    """
    whole = all_gather_fsdp(projection, axis=0)
    total = _sum_over_chunks(whole, inputs, counts, logits_dtype)
    return jax.lax.psum(total, mesh_axes("batch"))


def _sum_over_chunks(
    projection: Float[Array, "D V"],
    inputs: tuple[jax.Array, ...],
    counts: Bool[Array, " chunks"],
    logits_dtype: str,
) -> Float[Array, ""]:
    """Returns the weighted sum over chunks of hidden states, targets and weights.

    Those that do not count cost nothing.
    """

    def weighted_sum(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = jnp.einsum("BSD,DV->BSV", hidden, projection, preferred_element_type=logits_dtype)
        logits = with_logical_constraint(logits, None, None, "vocab").astype(jnp.float32)
        own_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - own_logits) * weights)

    def nothing(*chunk: jax.Array) -> jax.Array:
        return jnp.zeros_like(chunk[-1], shape=())

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(total: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
        chunk, counts = scanned
        return total + jax.lax.cond(counts, weighted_sum, nothing, *chunk), None

    total, _ = jax.lax.scan(add_chunk, nothing(inputs[-1]), (inputs, counts))
    return total
