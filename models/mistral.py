"""Mistral (arXiv 2310.06825): a decoder whose attention is causal or bidirectional by argument.

Legend of dimensions: B rows, S positions, M tokens (B x S), D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar, cast

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.models.attention import attention_mask
from grit_jax.models.layers import MLP, Attention, RMSNorm, into_branch, parameter
from grit_jax.sharding import constrain

# What the backward pass finds saved, by name; the rest it computes again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig:
    """Sizes of a Mistral, under the names of Hugging Face's config.json; the defaults are 7B's.

    `max_position_embeddings` is the longest text that the model is made for, in tokens.
    `initializer_range` is the standard deviation of an untrained model's embeddings; its other
    weights are scaled by their inputs. `dtype` is the type of the computation and `param_dtype`
    that of the parameters; `remat` names what a layer's backward pass computes again ("full") or
    finds saved ("none").

    Raises:
      ValueError: a size is impossible; the message names it.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0 and not isinstance(value, bool):
                raise ValueError(f"config.model.{field.name} must be positive, not {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.model.head_dim={self.head_dim} must be even, to be rotated")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(
                    f"config.model.{name}={getattr(self, name)!r} must be 'float32' or 'bfloat16'"
                )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"config.model.remat={self.remat!r} must be one of {sorted(REMAT_POLICIES)}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows of tokens that are read in one way.

    Attributes:
      tokens: token ids.
      segment_ids: which text of its row a token belongs to, from 1 on; 0 is padding.
      positions: position of each token in its own text, from 0 on.
      is_causal: whether a token sees only those before it, or all of its text.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    is_causal: bool = dataclasses.field(metadata={"static": True})


class DecoderLayer(nnx.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual connection."""

    def __init__(self, config: MistralConfig, feed_forward: type[nnx.Module], *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = cast(Any, feed_forward)(config, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "M D"], stream: Stream
    ) -> tuple[Float[Array, "M D"], Any]:
        """Returns the next hidden states, and the router's statistics (None without a router)."""
        mask = attention_mask(
            stream.segment_ids,
            stream.segment_ids,
            stream.positions,
            stream.positions,
            is_causal=stream.is_causal,
            sliding_window=self.config.sliding_window,
        )
        hidden += self.attention(self.attention_norm(hidden), stream.positions, mask)
        update, statistics = self.feed_forward(
            self.feed_forward_norm(hidden), stream.segment_ids.reshape(-1) > 0
        )
        return constrain(hidden + update, "batch", None), statistics


class Mistral(nnx.Module):
    """The decoder without its loss: token ids to hidden states, hidden states to logits."""

    feed_forward: ClassVar[type[nnx.Module]] = MLP

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, V = config.hidden_size, config.vocab_size

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, self.feed_forward, rngs=rngs)

        self.embedding = parameter(
            rngs, config, (V, D), ("vocab", "embed"), config.initializer_range
        )
        self.layers = stacked_layers(rngs)
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.head = parameter(rngs, config, (D, V), ("embed", "vocab"), into_branch(D))

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        is_causal: bool = True,
    ) -> Float[Array, "B S D"]:
        """Returns the hidden states after the last norm.

        Args:
          tokens: token ids.
          positions: position of each token in its text; by default its place in the row.
          segment_ids: which text of its row a token belongs to, 0 for padding; by default the row
            is one text.
          is_causal: whether a token sees only those before it, or all of its text.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        (hidden,), _ = self.run([Stream(tokens, segment_ids, positions, is_causal)])
        return hidden

    def run(self, streams: Sequence[Stream]) -> tuple[list[Float[Array, "B S D"]], list[Any]]:
        """Reads several streams side by side, so that each layer's weights are gathered once.

        Returns:
          The hidden states of each stream after the last norm, and each stream's statistics of the
          router, stacked over layers (None for a model without a router).
        """
        graph, layers = nnx.split(self.layers)

        def read_layer(hidden: list[jax.Array], layer_state: nnx.State):
            layer = nnx.merge(graph, layer_state)
            outputs = [layer(h, stream) for h, stream in zip(hidden, streams, strict=True)]
            return [h for h, _ in outputs], [statistics for _, statistics in outputs]

        policy = REMAT_POLICIES[self.config.remat]
        read_layer = jax.checkpoint(read_layer, policy=policy, prevent_cse=False)
        embedded = [self.embed(stream.tokens.reshape(-1)) for stream in streams]
        hidden, statistics = jax.lax.scan(read_layer, embedded, layers)
        rows = [  # [M, D] -> [B, S, D]
            self.norm(h).reshape(*stream.tokens.shape, -1)
            for h, stream in zip(hidden, streams, strict=True)
        ]
        return rows, statistics

    def embed(self, tokens: Int[Array, M]) -> Float[Array, "M D"]:
        """Returns the embedding of each token, in the type of the computation."""
        embedded = self.embedding[...].astype(self.config.dtype)[tokens]
        return constrain(embedded, "batch", None)

    def output_projection(self) -> Float[Array, "D V"]:
        """Returns the matrix that turns hidden states into logits."""
        if self.config.tie_word_embeddings:
            return self.embedding[...].T
        return self.head[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Returns the scores of each next token, in float32."""
        projection = self.output_projection().astype(hidden.dtype)
        return jnp.einsum("BSD,DV->BSV", hidden, projection, preferred_element_type=jnp.float32)
