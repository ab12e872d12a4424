"""The interface between a loss and the trainer.

A loss is a sum of terms, one per kind of text. To train on a new objective, write its `LossTerm`;
the trainer, the train step and GradCache call nothing but the methods of `Loss`.

Legend of dimensions: B rows, S positions, D hidden.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from grit_jax.data.batch import Batch
from grit_jax.models import Decoder, ModelConfig, Stream

# Parameters that the loss itself learns, by name.
LossParameters = dict[str, Float[Array, ""]]
# Values of losses, by name.
Losses = dict[str, Float[Array, ""]]
# Hidden states of the last layer, and router statistics, by stream.
Hidden = Mapping[str, Float[Array, "_ _ D"]]
Statistics = Mapping[str, Any]


class LossTerm(abc.ABC):
    """The losses of one kind of text, in two forms that GradCache can compute in chunks of rows.

    - Batch losses depend on all texts of the batch at once, such as a contrastive loss. They are
      functions of a summary: arrays whose sum over chunks is the summary of the whole batch, such
      as the pooled hidden states of all texts, with zeros for texts that are not in the chunk.
    - Row losses are sums over tokens, such as a cross-entropy. The sum over chunks is the loss of
      the whole batch. What they need to know of the whole batch are the weights of the tokens.
    """

    def initial_parameters(self) -> LossParameters:
        """Returns the first values of the parameters that the loss itself learns."""
        return {}

    @abc.abstractmethod
    def loss_weights(self, config: ModelConfig) -> dict[str, float]:
        """Returns the weight of each of the term's losses in the total."""

    @abc.abstractmethod
    def streams(self, part: Any) -> dict[str, Stream]:
        """Returns the input of the decoder, by stream.

        Args:
          part: the part of a batch that holds this kind of text, here and below.
        """

    def has_batch_losses(self, config: ModelConfig) -> bool:
        """Returns whether the term has batch losses, for a model of this configuration."""
        return False

    def summarize(self, model: Decoder, hidden: Hidden, statistics: Statistics, part: Any) -> Any:
        """Returns the summary of a part, a tree of arrays; None without batch losses."""
        return None

    def batch_losses(
        self, model: Decoder, loss_parameters: LossParameters, summary: Any, part: Any
    ) -> Losses:
        """Returns the batch losses, given the summary of the whole batch."""
        return {}

    def token_weights(self, part: Any) -> Float[Array, "B S"] | None:
        """Returns the weight of each token in the row losses, given the whole batch."""
        return None

    def row_losses(
        self, model: Decoder, hidden: Hidden, part: Any, token_weights: Float[Array, "B S"] | None
    ) -> Losses:
        """Returns the row losses of some rows, given the weights of their tokens."""
        return {}


class Loss:
    """A weighted sum of losses, from one term per kind of text.

    Args:
      terms: the term of each kind of text, by the kind's name. A batch may lack some kinds.
    """

    def __init__(self, terms: Mapping[str, LossTerm]):
        self.terms = dict(terms)

    def value(
        self, model: Decoder, loss_parameters: LossParameters, batch: Batch
    ) -> tuple[Float[Array, ""], Losses]:
        """Returns the total loss, and by name the total ("loss") and all losses, unweighted."""
        hidden, statistics = model.forward_streams(self.streams(batch))
        summary = self.summarize(model, hidden, statistics, batch)
        losses = self.batch_losses(model, loss_parameters, summary, batch)
        losses |= self.row_losses(model, hidden, batch, self.token_weights(batch))
        total = self.weighted_sum(losses, model.config)
        return total, {"loss": total, **losses}

    def initial_parameters(self) -> LossParameters:
        """Returns the first values of the parameters that the loss itself learns."""
        initial: LossParameters = {}
        for term in self.terms.values():
            initial |= term.initial_parameters()
        return initial

    def weighted_sum(self, losses: Losses, config: ModelConfig) -> Float[Array, ""]:
        """Returns the total of losses, each times its weight."""
        weights: dict[str, float] = {}
        for term in self.terms.values():
            weights |= term.loss_weights(config)
        return sum((weights[name] * value for name, value in losses.items()), jnp.zeros(()))

    def streams(self, batch: Batch) -> dict[str, Stream]:
        """Returns the input of the decoder, by stream."""
        streams: dict[str, Stream] = {}
        for term, part in self._terms_of(batch).values():
            streams |= term.streams(part)
        return streams

    def summarize(
        self, model: Decoder, hidden: Hidden, statistics: Statistics, batch: Batch
    ) -> dict[str, Any]:
        """Returns the summary of each kind of text that has batch losses."""
        summaries = {
            kind: term.summarize(model, hidden, statistics, part)
            for kind, (term, part) in self._terms_of(batch).items()
        }
        return {kind: summary for kind, summary in summaries.items() if summary is not None}

    def batch_losses(
        self,
        model: Decoder,
        loss_parameters: LossParameters,
        summary: Mapping[str, Any],
        batch: Batch,
    ) -> Losses:
        """Returns the batch losses, given the summary of the whole batch."""
        losses: Losses = {}
        for kind, own in summary.items():
            term, part = self.terms[kind], batch.parts[kind]
            losses |= term.batch_losses(model, loss_parameters, own, part)
        return losses

    def token_weights(self, batch: Batch) -> dict[str, Float[Array, "_ _"] | None]:
        """Returns the weight of each token in the row losses, by kind of text."""
        return {
            kind: term.token_weights(part) for kind, (term, part) in self._terms_of(batch).items()
        }

    def row_losses(
        self,
        model: Decoder,
        hidden: Hidden,
        batch: Batch,
        token_weights: Mapping[str, Float[Array, "_ _"] | None],
    ) -> Losses:
        """Returns the row losses of some rows, given the weights of their tokens."""
        losses: Losses = {}
        for kind, (term, part) in self._terms_of(batch).items():
            losses |= term.row_losses(model, hidden, part, token_weights[kind])
        return losses

    def _terms_of(self, batch: Batch) -> dict[str, tuple[LossTerm, Any]]:
        return {kind: (self.terms[kind], part) for kind, part in batch.parts.items()}
