"""The joint loss of GRIT: both streams of texts through the same weights, once.

Legend of dimensions: B rows, S positions, Q queries, P passages, D hidden.
"""

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from grit_jax.data.batch import Batch, EmbeddingBatch, PackedTexts
from grit_jax.fields import NonNegativeFloat
from grit_jax.models import Decoder, Stream
from grit_jax.objectives.contrastive import contrastive_loss
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.objectives.next_token import (
    REDUCTIONS,
    next_token_loss,
    shift_targets,
    target_weights,
)
from grit_jax.objectives.router import load_balancing_loss

LossParameters = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the two losses are taken and added.

    Attributes:
      embedding_weight: factor of the contrastive loss.
      generative_weight: factor of the next-token loss.
      temperature: of the contrastive loss, or its first value.
      learn_temperature: whether it is learned with the model.
      is_symmetric: whether positives are to find their queries too (see `contrastive_loss`).
      generative_reduction: "mixed", "token" or "mean" (see `objectives.next_token`).
      generative_group_size: texts in a group of "mixed".
      embedding: attention pattern and pooling.

    Raises:
      ValueError: a name is unknown or a number impossible; the message names the field.
    """

    embedding_weight: NonNegativeFloat = 1.0
    generative_weight: NonNegativeFloat = 1.0
    temperature: float = 0.02
    learn_temperature: bool = False
    is_symmetric: bool = False
    generative_reduction: str = "mixed"
    generative_group_size: int = 32
    embedding: EmbeddingSpec = dataclasses.field(default_factory=EmbeddingSpec)

    def __post_init__(self):
        if self.generative_reduction not in REDUCTIONS:
            raise ValueError(
                f"config.loss.generative_reduction={self.generative_reduction!r} must be one of "
                f"{', '.join(REDUCTIONS)}"
            )
        for name in ("temperature", "generative_group_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.loss.{name}={getattr(self, name)} must be positive")


def initial_loss_parameters(config: LossConfig) -> dict[str, Float[Array, ""]]:
    """Returns what the loss itself learns: the logarithm of the temperature, or nothing."""
    if not config.learn_temperature:
        return {}
    return {"log_temperature": jnp.log(jnp.float32(config.temperature))}


def joint_loss(
    model: Decoder, loss_parameters: LossParameters, batch: Batch, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss to be minimised, and its parts by name.

    The parts are `loss`, and where the batch has the stream `embedding_loss`, `generative_loss`
    (both unweighted) and, for a Mixtral, `router_loss` (on the generative stream alone; unweighted
    by its coefficient).
    """
    hidden, statistics = model.forward_streams(batch_streams(batch, config.embedding))
    parts = {}
    if batch.embedding is not None:
        pooled = pool_pairs(hidden, batch.embedding, config)
        parts["embedding_loss"] = embedding_loss(
            model, loss_parameters, pooled, batch.embedding, config
        )
    if batch.chats is not None:
        weights = chat_weights(batch.chats, config)
        parts["generative_loss"] = generative_loss(model, hidden["chats"], batch.chats, weights)
        if router := statistics.get("chats"):
            parts["router_loss"] = load_balancing_loss(
                router.choices, router.probabilities, router.tokens
            )
    loss = weighted_sum(parts, model, config)
    return loss, {"loss": loss, **parts}


def weighted_sum(
    parts: dict[str, Float[Array, ""]], model: Decoder, config: LossConfig
) -> Float[Array, ""]:
    """Returns the parts of the loss, added up with their weights."""
    weights = {
        "embedding_loss": config.embedding_weight,
        "generative_loss": config.generative_weight,
        "router_loss": model.config.router_aux_loss_coef,
    }
    return sum((weights[name] * part for name, part in parts.items()), jnp.zeros(()))


def batch_streams(batch: Batch, embedding: EmbeddingSpec) -> dict[str, Stream]:
    """Returns the streams of a batch by name: "queries" and "passages", and "chats"."""
    streams = {}
    if batch.embedding is not None:
        streams["queries"] = embedding.stream(batch.embedding.queries)
        streams["passages"] = embedding.stream(batch.embedding.passages)
    if batch.chats is not None:
        chats = batch.chats
        streams["chats"] = Stream(chats.tokens, chats.segment_ids, chats.positions, is_causal=True)
    return streams


def pool_pairs(
    hidden: Mapping[str, Float[Array, "_ _ D"]], batch: EmbeddingBatch, config: LossConfig
) -> tuple[Float[Array, "Q D"], Float[Array, "P D"]]:
    """Returns the pooled hidden states of queries and passages; zeros for a text not in the rows.

    So the pooled texts of parts of a batch add up to those of the whole.
    """
    return (
        config.embedding.pool(hidden["queries"], batch.queries),
        config.embedding.pool(hidden["passages"], batch.passages),
    )


def embedding_loss(
    model: Decoder,
    loss_parameters: LossParameters,
    pooled: tuple[Float[Array, "Q D"], Float[Array, "P D"]],
    batch: EmbeddingBatch,
    config: LossConfig,
) -> Float[Array, ""]:
    """Returns the contrastive loss of pooled queries and passages."""
    temperature = config.temperature
    if config.learn_temperature:
        temperature = jnp.exp(loss_parameters["log_temperature"])
    queries, passages = (config.embedding.project(model, texts) for texts in pooled)
    return contrastive_loss(
        queries,
        passages,
        batch.positives,
        batch.passage_ids,
        temperature,
        is_symmetric=config.is_symmetric,
    )


def chat_weights(chats: PackedTexts, config: LossConfig) -> Float[Array, "B S"]:
    """Returns the weight of what follows each token of the chats in the generative loss."""
    _, is_target = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
    return target_weights(
        config.generative_reduction,
        is_target,
        chats.segment_ids,
        chats.num_texts,
        config.generative_group_size,
    )


def generative_loss(
    model: Decoder,
    hidden: Float[Array, "B S D"],
    chats: PackedTexts,
    weights: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Returns the weighted sum of the cross-entropies of the tokens to be learned."""
    targets, _ = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
    return next_token_loss(
        hidden,
        model.output_projection(),
        targets,
        weights,
        logits_dtype=model.config.logits_dtype,
    )
