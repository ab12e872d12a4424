"""The gradient of a loss, computed in chunks of the batch (GradCache, arXiv 2101.06983).

A contrastive loss needs the embeddings of all texts at once, but not all activations:

    1. Forward pass of each chunk without gradient, which keeps the chunk's summary.
    2. Batch losses of the summary of the whole batch, and their gradient.
    3. Forward and backward pass of each chunk. The gradient of (the chunk's summary times the
       gradient of step 2) plus the chunk's row losses is the chunk's share of the total gradient.

The result equals the gradient of the undivided batch. It costs a second forward pass of the texts
with batch losses: the embedding texts, and the chats of a model with a router.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.models import Decoder
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import microbatch
from grit_jax.training.loss import Loss, Losses


@pytree_dataclass
class _Chunk:
    """A chunk's rows as a batch, and the weights of their tokens in the row losses."""

    batch: Batch
    token_weights: dict[str, Any]


def chunked_value_and_grad(
    model_of: Callable[[Any], Decoder],
    trained: dict[str, Any],
    batch: Batch,
    loss: Loss,
    num_chunks: int,
    constrain: Callable[[Any], Any],
) -> tuple[Losses, Any]:
    """Returns the losses by name, and the gradient of the total with respect to `trained`.

    Args:
      model_of: returns the model with given trained parameters.
      trained: the trained parameters: "model", and "loss" for those of the loss itself.
      batch: the batch; the rows of each stream are a multiple of `num_chunks` times the shards.
      loss: the loss.
      num_chunks: number of chunks.
      constrain: constrains the sharding of a gradient to that of the parameters.
    """
    chunks = _divide(batch, loss, num_chunks)
    config = model_of(trained).config
    summarized = [kind for kind in batch.parts if loss.terms[kind].has_batch_losses(config)]
    losses: Losses = {}
    summary_gradient: dict[str, Any] = {}
    initial_gradient = None
    if summarized:

        def summary_of(chunk: _Chunk) -> dict[str, Any]:
            parts = {kind: chunk.batch.parts[kind] for kind in summarized}
            return _summary(model_of(trained), loss, Batch(parts))

        def total_of_summary(
            trained: dict[str, Any], summary: dict[str, Any]
        ) -> tuple[Array, Losses]:
            losses = loss.batch_losses(model_of(trained), trained["loss"], summary, batch)
            return loss.weighted_sum(losses, config), losses

        gradient_of = jax.grad(total_of_summary, argnums=(0, 1), has_aux=True)
        summary = _sum_over(chunks, summary_of)
        (initial_gradient, summary_gradient), losses = gradient_of(trained, summary)

    def share(trained: dict[str, Any], chunk: _Chunk) -> tuple[Array, Losses]:
        model = model_of(trained)
        hidden, statistics = model.forward_streams(loss.streams(chunk.batch))
        losses = loss.row_losses(model, hidden, chunk.batch, chunk.token_weights)
        summary = loss.summarize(model, hidden, statistics, chunk.batch)
        products = jax.tree.map(jnp.vdot, summary, summary_gradient)
        total = loss.weighted_sum(losses, config) + sum(jax.tree.leaves(products))
        return total, losses

    def gradient_of_chunk(chunk: _Chunk) -> tuple[Any, Losses]:
        gradient, losses = jax.grad(share, has_aux=True)(trained, chunk)
        return constrain(gradient), losses

    gradient, row_losses = _sum_over(chunks, gradient_of_chunk)
    losses |= row_losses
    if initial_gradient is not None:
        gradient = jax.tree.map(jnp.add, initial_gradient, gradient)
    return {"loss": loss.weighted_sum(losses, config), **losses}, gradient


def _summary(model: Decoder, loss: Loss, batch: Batch) -> dict[str, Any]:
    hidden, statistics = model.forward_streams(loss.streams(batch))
    return loss.summarize(model, hidden, statistics, batch)


def _divide(batch: Batch, loss: Loss, num_chunks: int) -> _Chunk:
    """Returns the batch as chunks: rows [B, S] as [chunks, B / chunks, S], others repeated."""

    def divide(array: jax.Array) -> jax.Array:
        return microbatch(array, num_chunks)

    def divide_rows(node: Any) -> Any:
        if isinstance(node, PackedTexts):
            return jax.tree.map(divide, node)
        return jnp.broadcast_to(node, (num_chunks, *node.shape))

    parts = jax.tree.map(
        divide_rows, batch.parts, is_leaf=lambda node: isinstance(node, PackedTexts)
    )
    return _Chunk(Batch(parts), jax.tree.map(divide, loss.token_weights(batch)))


def _sum_over(chunks: _Chunk, function: Callable[[_Chunk], Any]) -> Any:
    """Returns the sum of a function's results over all chunks."""
    first = jax.tree.map(lambda array: array[0], chunks)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, chunk: _Chunk) -> tuple[Any, None]:
        # XLA for TPUs fails if it moves a reduction out of the loop, past the sum.
        values = jax.lax.optimization_barrier(function(chunk))
        return jax.tree.map(jnp.add, total, values), None

    return jax.lax.scan(add, zeros, chunks)[0]
