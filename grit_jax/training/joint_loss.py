"""The joint loss of GRIT: a contrastive and a next-token loss through the same weights.

Legend of dimensions: B rows, S positions, Q queries, P passages, D hidden.
"""

from collections.abc import Callable
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from grit_jax.data.batch import ChatBatch, EmbeddingBatch
from grit_jax.fields import NonNegativeFloat
from grit_jax.models import Decoder, ModelConfig, RouterStatistics, Stream
from grit_jax.objectives.contrastive import contrastive_loss
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.objectives.next_token import (
    REDUCTIONS,
    next_token_loss,
    shift_targets,
    target_weights,
)
from grit_jax.objectives.router import load_balancing_loss
from grit_jax.training.loss import Hidden, Loss, Losses, LossParameters, LossTerm, Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Configuration of the joint loss.

    Attributes:
      embedding_weight: weight of the contrastive loss.
      generative_weight: weight of the next-token loss.
      temperature: temperature of the contrastive loss, or its initial value if it is learned.
      learn_temperature: whether the temperature is trained with the model.
      is_symmetric: whether positives are also scored against all queries (see `contrastive_loss`).
      generative_reduction: "mixed", "token" or "mean" (see `objectives.next_token`).
      generative_group_size: texts per group of the reduction "mixed".
      embedding: attention pattern and pooling of embeddings.

    Raises:
      ValueError: a name is unknown or a number is out of range; the message names the field.
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


class ContrastiveTerm(LossTerm):
    """InfoNCE of pooled queries and passages: `embedding_loss`."""

    def __init__(self, config: LossConfig):
        self.config = config

    def initial_parameters(self) -> LossParameters:
        """Returns the logarithm of the temperature, if it is learned."""
        if not self.config.learn_temperature:
            return {}
        return {"log_temperature": jnp.log(jnp.float32(self.config.temperature))}

    def loss_weights(self, config: ModelConfig) -> dict[str, float]:
        """Returns the weight of the contrastive loss."""
        return {"embedding_loss": self.config.embedding_weight}

    def streams(self, part: EmbeddingBatch) -> dict[str, Stream]:
        """Returns queries and passages as input of the decoder."""
        return {name: self.config.embedding.stream(rows) for name, rows in part.streams.items()}

    def has_batch_losses(self, config: ModelConfig) -> bool:
        """Returns True: every query is scored against the passages of the whole batch."""
        return True

    def summarize(
        self, model: Decoder, hidden: Hidden, statistics: Statistics, part: EmbeddingBatch
    ) -> dict[str, Float[Array, "_ D"]]:
        """Returns the pooled hidden states of each text, zeros for texts outside the rows."""
        streams = part.streams
        return {name: self.config.embedding.pool(hidden[name], streams[name]) for name in streams}

    def batch_losses(
        self,
        model: Decoder,
        loss_parameters: LossParameters,
        summary: dict[str, Float[Array, "_ D"]],
        part: EmbeddingBatch,
    ) -> Losses:
        """Returns the contrastive loss of pooled queries and passages."""
        temperature = self.config.temperature
        if self.config.learn_temperature:
            temperature = jnp.exp(loss_parameters["log_temperature"])
        loss = contrastive_loss(
            self.config.embedding.embed_pooled(model, summary["query"]),
            self.config.embedding.embed_pooled(model, summary["passage"]),
            part.positives,
            part.passage_ids,
            temperature,
            query_ids=part.query_ids,
            is_symmetric=self.config.is_symmetric,
        )
        return {"embedding_loss": loss}


class NextTokenTerm(LossTerm):
    """Cross-entropy of the answers of chats, `generative_loss`.

    A model with a router also has the load-balancing loss of its experts on the chats,
    `router_loss`.
    """

    def __init__(self, config: LossConfig):
        self.config = config

    def loss_weights(self, config: ModelConfig) -> dict[str, float]:
        """Returns the weights of the next-token and the load-balancing loss."""
        return {
            "generative_loss": self.config.generative_weight,
            "router_loss": config.router_aux_loss_coef,
        }

    def streams(self, part: ChatBatch) -> dict[str, Stream]:
        """Returns chats as input of the decoder."""
        return {
            name: Stream(rows.tokens, rows.segment_ids, rows.positions, is_causal=True)
            for name, rows in part.streams.items()
        }

    def has_batch_losses(self, config: ModelConfig) -> bool:
        """Returns whether the model has a load-balancing loss.

        That loss is a product of two means over all chats.
        """
        return config.has_experts

    def summarize(
        self, model: Decoder, hidden: Hidden, statistics: Statistics, part: ChatBatch
    ) -> RouterStatistics | None:
        """Returns the router's statistics on the chats, or None for a model without a router."""
        return statistics.get("chat")

    def batch_losses(
        self,
        model: Decoder,
        loss_parameters: LossParameters,
        summary: RouterStatistics,
        part: ChatBatch,
    ) -> Losses:
        """Returns the load-balancing loss."""
        loss = load_balancing_loss(summary.choices, summary.probabilities, summary.tokens)
        return {"router_loss": loss}

    def token_weights(self, part: ChatBatch) -> Float[Array, "B S"]:
        """Returns the weight of the token that follows each token of the chats."""
        chats = part.chats
        _, is_target = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
        return target_weights(
            self.config.generative_reduction,
            is_target,
            chats.segment_ids,
            chats.num_texts,
            self.config.generative_group_size,
        )

    def row_losses(
        self,
        model: Decoder,
        hidden: Hidden,
        part: ChatBatch,
        token_weights: Float[Array, "B S"] | None,
    ) -> Losses:
        """Returns the weighted sum of the cross-entropies of the target tokens."""
        assert token_weights is not None
        chats = part.chats
        targets, _ = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
        loss = next_token_loss(
            hidden["chat"],
            model.output_projection(),
            targets,
            token_weights,
            logits_dtype=model.config.logits_dtype,
            softcap=model.config.final_logit_softcapping,
        )
        return {"generative_loss": loss}


# The term of each kind of text, by the names in `text.kinds.TEXT_KINDS`.
JOINT_LOSS_TERMS: dict[str, Callable[[LossConfig], LossTerm]] = {
    "embedding": ContrastiveTerm,
    "generative": NextTokenTerm,
}


def make_joint_loss(config: LossConfig) -> Loss:
    """Returns the joint loss of GRIT."""
    return Loss({kind: make_term(config) for kind, make_term in JOINT_LOSS_TERMS.items()})
