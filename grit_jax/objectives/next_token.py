"""The generative loss of GRIT: cross-entropy of the next token, without ever holding the logits.

Legend of dimensions: B rows, S positions, D hidden, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.objectives.pooling import sum_by_text
from grit_jax.sharding import constrain

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
    chunk_size: int = 256,
) -> Float[Array, ""]:
    """Returns the weighted sum of the cross-entropies of `targets`, in float32 nats.

    The logits exist for `chunk_size` positions of each row at a time, and are computed again in
    the backward pass.
    """
    B, S, _ = hidden.shape
    chunk_size = min(chunk_size, S)
    padding = -S % chunk_size

    def chunks(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        split = padded.reshape(B, (S + padding) // chunk_size, chunk_size, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weights = chunk
        logits = jnp.einsum(
            "BSD,DV->BSV",
            hidden,
            projection.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = constrain(logits, "batch", None, "vocab")
        own_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        cross_entropies = jax.nn.logsumexp(logits, axis=-1) - own_logits
        return total + jnp.sum(cross_entropies * weights), None

    inputs = (chunks(hidden), chunks(targets), chunks(weights))
    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), inputs)
    return total
