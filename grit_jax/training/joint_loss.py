"""The joint loss of GRIT: both streams of texts through the same weights, once.

Legend of dimensions: Q queries, P passages, D hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grit_jax.data.batch import Batch, EmbeddingBatch, PackedTexts
from grit_jax.models import Mistral, MixtralConfig, RouterStatistics, Stream
from grit_jax.objectives.contrastive import contrastive_loss
from grit_jax.objectives.next_token import (
    REDUCTIONS,
    next_token_loss,
    shift_targets,
    target_weights,
)
from grit_jax.objectives.pooling import POOLINGS, normalize, pool
from grit_jax.objectives.router import load_balancing_loss

# Embedding instruction, embedding text, generation instruction, generation text: a token sees all
# of its text (b), or what is before it (c).
PATTERNS = ("bbcc", "cbcc", "cccc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the two losses are taken and added.

    Attributes:
      embedding_weight: factor of the contrastive loss.
      generative_weight: factor of the next-token loss.
      temperature: of the contrastive loss.
      generative_reduction: "mixed", "token" or "mean" (see `objectives.next_token`).
      generative_group_size: texts in a group of "mixed".
      attention: one of `PATTERNS`.
      pooling: "mean", "weightedmean", "lasttoken" or "cls".

    Raises:
      ValueError: a name is unknown or a number impossible; the message names the field.
    """

    embedding_weight: float = 1.0
    generative_weight: float = 1.0
    temperature: float = 0.02
    generative_reduction: str = "mixed"
    generative_group_size: int = 32
    attention: str = "bbcc"
    pooling: str = "mean"

    def __post_init__(self):
        if self.attention not in PATTERNS:
            raise ValueError(
                f"config.model.attention={self.attention!r} must be one of {', '.join(PATTERNS)}: "
                f"{_problem_of_pattern(self.attention)}"
            )
        choices = {
            "model.pooling": (self.pooling, POOLINGS),
            "loss.generative_reduction": (self.generative_reduction, REDUCTIONS),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"config.{name}={value!r} must be one of {', '.join(allowed)}")
        for name in ("temperature", "generative_group_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.loss.{name}={getattr(self, name)} must be positive")


def joint_loss(
    model: Mistral, batch: Batch, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss to be minimised, and its parts by name.

    The parts are `loss`, and where the batch has the stream `embedding_loss`, `generative_loss`
    (both unweighted) and, for a Mixtral, `router_loss` (on the generative stream alone; unweighted
    by its coefficient).
    """
    streams = []
    if batch.embedding is not None:
        streams.append(embedding_stream(batch.embedding.queries, config.attention))
        streams.append(embedding_stream(batch.embedding.passages, config.attention))
    if batch.chats is not None:
        chats = batch.chats
        streams.append(Stream(chats.tokens, chats.segment_ids, chats.positions, is_causal=True))
    hidden, statistics = model.run(streams)

    loss = jnp.zeros((), jnp.float32)
    parts = {}
    if batch.embedding is not None:
        parts["embedding_loss"] = _embedding_loss(model, hidden, batch.embedding, config)
        loss += config.embedding_weight * parts["embedding_loss"]
    if batch.chats is not None:
        parts["generative_loss"] = _generative_loss(model, hidden[-1], batch.chats, config)
        loss += config.generative_weight * parts["generative_loss"]
        if isinstance(router := statistics[-1], RouterStatistics):
            parts["router_loss"] = load_balancing_loss(
                router.choices, router.probabilities, router.tokens
            )
            assert isinstance(model.config, MixtralConfig)
            loss += model.config.router_aux_loss_coef * parts["router_loss"]
    return loss, {"loss": loss, **parts}


def embed_texts(
    model: Mistral, texts: PackedTexts, config: LossConfig
) -> Float[Array, "num_texts D"]:
    """Returns the normalised embedding of each text, in float32."""
    (hidden,), _ = model.run([embedding_stream(texts, config.attention)])
    return _pool(model, hidden, texts, config)


def embedding_stream(texts: PackedTexts, attention: str) -> Stream:
    """Returns texts to be embedded as a stream that is read in the pattern `attention`.

    What is not pooled, `<s>` and instruction, is governed by the first letter, the rest by the
    second.
    """
    instruction, text = attention[:2]
    return Stream(
        texts.tokens,
        texts.segment_ids,
        texts.positions,
        is_causal=text == "c",
        causal_tokens=None if instruction == text else ~texts.mask,
    )


def _problem_of_pattern(attention: str) -> str:
    if len(attention) != 4 or set(attention) - set("bc"):
        return "four letters, each b (bidirectional) or c (causal)"
    if attention.endswith("cc"):
        return "an instruction that sees its text would show it to tokens that are to be causal"
    return "a chat is generated one token after the other, each from those before it"


def _pool(model: Mistral, hidden: jax.Array, texts: PackedTexts, config: LossConfig) -> jax.Array:
    pooled = pool(
        hidden, texts.mask, texts.segment_ids, texts.positions, texts.num_texts, config.pooling
    )
    return normalize(model.project(pooled))


def _embedding_loss(
    model: Mistral, hidden: list[jax.Array], batch: EmbeddingBatch, config: LossConfig
) -> jax.Array:
    return contrastive_loss(
        _pool(model, hidden[0], batch.queries, config),
        _pool(model, hidden[1], batch.passages, config),
        batch.positives,
        batch.passage_contents,
        config.temperature,
    )


def _generative_loss(
    model: Mistral, hidden: jax.Array, chats: PackedTexts, config: LossConfig
) -> jax.Array:
    targets, is_target = shift_targets(chats.tokens, chats.segment_ids, chats.mask)
    weights = target_weights(
        config.generative_reduction,
        is_target,
        chats.segment_ids,
        chats.num_texts,
        config.generative_group_size,
    )
    return next_token_loss(
        hidden,
        model.output_projection(),
        targets,
        weights,
        logits_dtype=model.config.logits_dtype,
    )
