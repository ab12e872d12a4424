"""The gradient of the joint loss, a part of the batch at a time (GradCache, arXiv 2101.06983).

The contrastive loss needs all embeddings at once, but not all activations:

    1. read the texts in chunks, keeping their pooled states      no gradient
    2. the contrastive loss and its gradient with respect to them
    3. read chunk by chunk again; the gradient of (pooled states x their gradient), and of the
       chunk's share of the generative loss, is the chunk's share of the gradient

It is the gradient of the undivided batch, at the price of a second forward pass of the embedding
stream. The load-balancing loss of a Mixtral is a product of two means over all chats; the one that
has no gradient is taken in the first pass, in which the chats are then read as well.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grit_jax.data.batch import Batch
from grit_jax.models import Decoder
from grit_jax.objectives.router import load_balancing_loss
from grit_jax.sharding import microbatch
from grit_jax.training.joint_loss import (
    LossConfig,
    batch_streams,
    chat_weights,
    embedding_loss,
    generative_loss,
    pool_pairs,
    weighted_sum,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk's rows, as a batch, and the weights of its chats' targets."""

    batch: Batch
    weights: Float[Array, "B S"] | None


def chunked_value_and_grad(
    model_of: Callable[[Any], Decoder],
    trained: dict[str, Any],
    batch: Batch,
    config: LossConfig,
    num_chunks: int,
    lay_out: Callable[[Any], Any],
) -> tuple[dict[str, Float[Array, ""]], Any]:
    """Returns the parts of the joint loss, and its gradient with respect to `trained`.

    Args:
      model_of: makes the model of trained parameters.
      trained: the parameters: "model", and "loss", those of the loss itself.
      batch: of which the rows of each stream are a multiple of `num_chunks` times the shards.
      config: of the joint loss.
      num_chunks: number of parts.
      lay_out: lays a gradient on the mesh as the parameters are.
    """
    chunks = _divide(batch, config, num_chunks)
    has_router = model_of(trained).config.has_experts and batch.chats is not None
    pooled, router = _sum_over(
        chunks, lambda chunk: _read(model_of(trained), chunk.batch, config, has_router)
    )
    parts: dict[str, Float[Array, ""]] = {}
    gradient, of_pooled = None, None
    if batch.embedding is not None:

        def of_embeddings(trained: dict[str, Any], pooled: Any) -> tuple[Array, Array]:
            assert batch.embedding is not None
            model = model_of(trained)
            loss = embedding_loss(model, trained["loss"], pooled, batch.embedding, config)
            return config.embedding_weight * loss, loss

        grad = jax.grad(of_embeddings, argnums=(0, 1), has_aux=True)
        (gradient, of_pooled), parts["embedding_loss"] = grad(trained, pooled)

    def share(trained: dict[str, Any], chunk: _Chunk) -> tuple[Array, dict[str, Array]]:
        model = model_of(trained)
        hidden, statistics = model.forward_streams(batch_streams(chunk.batch, config.embedding))
        shares: dict[str, Array] = {}
        if chunk.batch.chats is not None and chunk.weights is not None:
            shares["generative_loss"] = generative_loss(
                model, hidden["chats"], chunk.batch.chats, chunk.weights
            )
        if has_router:
            shares["router_loss"] = load_balancing_loss(
                router.choices, statistics["chats"].probabilities, router.tokens
            )
        loss = weighted_sum(shares, model, config)
        if chunk.batch.embedding is not None:
            pooled = pool_pairs(hidden, chunk.batch.embedding, config)
            products = jax.tree.map(jnp.vdot, pooled, of_pooled)
            loss += sum(jax.tree.leaves(products))
        return loss, shares

    def gradient_of(chunk: _Chunk) -> tuple[Any, dict[str, Array]]:
        gradient, shares = jax.grad(share, has_aux=True)(trained, chunk)
        return lay_out(gradient), shares

    of_chunks, shares = _sum_over(chunks, gradient_of)
    parts |= shares
    if gradient is not None:
        of_chunks = jax.tree.map(jnp.add, gradient, of_chunks)
    loss = weighted_sum(parts, model_of(trained), config)
    return {"loss": loss, **parts}, of_chunks


def _read(model: Decoder, batch: Batch, config: LossConfig, has_router: bool) -> tuple[Any, Any]:
    """Returns the pooled texts of a chunk, and the router's statistics on its chats."""
    if not has_router:
        batch = dataclasses.replace(batch, chats=None)
    streams = batch_streams(batch, config.embedding)
    if not streams:
        return None, None
    hidden, statistics = model.forward_streams(streams)
    pooled = None
    if batch.embedding is not None:
        pooled = pool_pairs(hidden, batch.embedding, config)
    return pooled, statistics["chats"] if has_router else None


def _divide(batch: Batch, config: LossConfig, num_chunks: int) -> _Chunk:
    """Returns the batch as chunks: each array of rows [B, S] as [chunks, B / chunks, S]."""

    def divide(array: jax.Array) -> jax.Array:
        return microbatch(array, num_chunks)

    def whole(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(array, (num_chunks, *array.shape))

    embedding = batch.embedding
    if embedding is not None:
        embedding = dataclasses.replace(
            jax.tree.map(whole, embedding),
            queries=jax.tree.map(divide, embedding.queries),
            passages=jax.tree.map(divide, embedding.passages),
        )
    weights = None if batch.chats is None else divide(chat_weights(batch.chats, config))
    return _Chunk(Batch(embedding, jax.tree.map(divide, batch.chats)), weights)


def _sum_over(chunks: _Chunk, function: Callable[[_Chunk], Any]) -> Any:
    """Returns the sum of a function's values of all chunks."""
    first = jax.tree.map(lambda array: array[0], chunks)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, chunk: _Chunk) -> tuple[Any, None]:
        # The compiler for TPUs fails where it moves a reduction out of the loop, behind the sum.
        values = jax.lax.optimization_barrier(function(chunk))
        return jax.tree.map(jnp.add, total, values), None

    return jax.lax.scan(add, zeros, chunks)[0]
