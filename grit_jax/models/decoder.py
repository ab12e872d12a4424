"""The decoder: token ids to hidden states, and hidden states to logits or embeddings.

One module serves all architectures. Attention is causal or bidirectional by argument. For
dimensions see `grit_jax.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, cast, overload

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from grit_jax.models.architecture import Architecture
from grit_jax.models.attention import AttentionMask
from grit_jax.models.config import ModelConfig
from grit_jax.models.experts import RouterStatistics
from grit_jax.models.kv_cache import KVCache
from grit_jax.models.layers import Attention, EmbeddingProjection, RMSNorm, soft_cap
from grit_jax.models.paged_cache import Cache, PagedCache
from grit_jax.models.remat import REMAT_POLICIES
from grit_jax.models.weights import WeightTable
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import all_gather_fsdp, mesh_axes, partition_spec, with_logical_constraint


@pytree_dataclass
class Stream:
    """Rows of tokens with one attention pattern.

    Attributes:
      tokens: token ids.
      segment_ids: ID of each token's text, from 1 on and unique within the row; 0 is padding.
      positions: position of each token in its text, from 0 on.
      is_causal: whether tokens attend only to earlier tokens of their text, or to all of it.
      causal_query_mask: tokens that attend causally even if `is_causal` is False.
    """

    tokens: Int[Array | np.ndarray, "B S"]
    segment_ids: Int[Array | np.ndarray, "B S"]
    positions: Int[Array | np.ndarray, "B S"]
    is_causal: bool = dataclasses.field(metadata={"static": True})
    causal_query_mask: Bool[Array | np.ndarray, "B S"] | None = None


class HeadError(ValueError):
    """A model without a language model head was asked for logits."""


class DecoderLayer(nnx.Module):
    """Attention and a feed-forward network, each with a norm and a residual connection.

    The table of weights says whether their outputs are normalized, too (Gemma).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightTable,
        feed_forward: type[nnx.Module],
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.attention_norm = RMSNorm(config, weights, "layers.attention_norm", rngs=rngs)
        self.attention = Attention(config, weights, "layers.attention", rngs=rngs)
        self.feed_forward_norm = RMSNorm(config, weights, "layers.feed_forward_norm", rngs=rngs)
        self.feed_forward = cast(Any, feed_forward)(
            config, weights, "layers.feed_forward", rngs=rngs
        )
        for name in ("attention_output_norm", "feed_forward_output_norm"):
            if f"layers.{name}.scale" in weights:
                setattr(self, name, RMSNorm(config, weights, f"layers.{name}", rngs=rngs))

    def __call__(
        self,
        hidden: Float[Array, "M D"],
        stream: Stream,
        cache: Cache | None,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "M D"], Cache | None, RouterStatistics | None]:
        """Returns the next hidden states, the cache, and the statistics of the router, if any.

        Args:
          hidden: hidden states of the stream's tokens.
          stream: the stream.
          cache: a cache with slots reserved for the tokens, or None.
          layer: index of the layer.
        """
        mask = AttentionMask(
            stream.segment_ids,
            stream.positions,
            stream.is_causal,
            stream.causal_query_mask,
            self.config.sliding_window,
            self._is_sliding(layer),
            key_segment_ids=None if cache is None else cache.segment_ids,
            key_positions=None if cache is None else cache.positions,
        )
        update, cache = self.attention(self.attention_norm(hidden), mask, cache, layer)
        hidden += self._output_norm("attention", update)
        update, statistics = self.feed_forward(
            self.feed_forward_norm(hidden), jnp.asarray(stream.segment_ids).reshape(-1) > 0
        )
        hidden += self._output_norm("feed_forward", update)
        return with_logical_constraint(hidden, "batch", None), cache, statistics

    def _is_sliding(self, layer: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Returns whether a layer has the sliding window: a bool if all are alike."""
        are_sliding = self.config.sliding_layers()
        if are_sliding.all() or not are_sliding.any():
            return bool(are_sliding[0])
        if isinstance(layer, int):
            return bool(are_sliding[layer])
        return jnp.asarray(are_sliding)[layer]

    def _output_norm(self, name: str, update: Float[Array, "M D"]) -> Float[Array, "M D"]:
        norm = getattr(self, f"{name}_output_norm", None)
        return update if norm is None else norm(update)


class Decoder(nnx.Module):
    """The decoder without its loss.

    `layers` is one module whose parameters are stacked over the layers. It may be replaced by an
    `nnx.List` with a module for each layer, which gives the same results.
    """

    def __init__(self, config: ModelConfig, architecture: Architecture, *, rngs: nnx.Rngs):
        self.config = config
        weights = architecture.weights(config)
        self.embedding_scale = architecture.embedding_scale(config)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, weights, architecture.feed_forward, rngs=rngs)

        self.embedding = weights["embedding"].initialize(config, rngs)
        self.layers: DecoderLayer | nnx.List = stacked_layers(rngs)
        self.norm = RMSNorm(config, weights, "norm", rngs=rngs)
        if config.has_lm_head and not config.tie_word_embeddings:
            self.head = weights["head"].initialize(config, rngs)
        if config.embedding_projection_size is not None:
            self.embedding_projection = EmbeddingProjection(
                config, weights, "embedding_projection", rngs=rngs
            )

    @overload
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        positions: Int[Array | np.ndarray, "B S"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        is_causal: bool = True,
        cache: None = None,
    ) -> Float[Array, "B S D"]: ...

    @overload
    def __call__[AnyCache: Cache](
        self,
        tokens: Int[Array | np.ndarray, "B S"],
        positions: Int[Array | np.ndarray, "B S"] | None = None,
        segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
        is_causal: bool = True,
        *,
        cache: AnyCache,
    ) -> tuple[Float[Array, "B S D"], AnyCache]: ...

    def __call__(self, tokens, positions=None, segment_ids=None, is_causal=True, cache=None):
        """Returns the hidden states after the last norm, and the updated cache if one is given.

        With a cache, tokens also attend to the tokens of their text from earlier calls. Those keys
        and values do not change: a document may be encoded bidirectionally and a question after it
        causally.

        Args:
          tokens: token ids.
          positions: position of each token in its text. By default its index in the row without
            padding, plus the number of the row's tokens in the cache.
          segment_ids: ID of each token's text, from 1 on and unique within the row; 0 is padding.
            By default each row is one text.
          is_causal: whether tokens attend only to earlier tokens of their text, or to all of it.
          cache: the result of `make_cache` or of an earlier call. In a jitted function the caller
            must ensure that `cache.length` + S <= `cache.num_slots`: tokens that do not fit
            overwrite the last slots. `cache.length` counts them, so it can be checked afterwards.
            Or a `PagedCache` with pages for the tokens.

        Raises:
          ValueError: the cache has no room for the tokens.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.cumsum(segment_ids > 0, axis=1) - 1
            if cache is not None:
                positions += cache.next_positions()[:, None]
        if cache is not None:
            cache = cache.reserve(positions, segment_ids)
        stream = Stream(tokens, segment_ids, positions, is_causal)
        hidden, caches, _ = self._forward({"tokens": stream}, {"tokens": cache})
        return hidden["tokens"] if cache is None else (hidden["tokens"], caches["tokens"])

    def make_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """Returns an empty cache for `batch_size` rows of `num_slots` tokens, padding included.

        In a jitted function with a mesh, each device creates only its own part.
        """
        L, B, T = self.config.num_hidden_layers, batch_size, num_slots
        shape = (L, B, T, self.config.num_key_value_heads, self.config.head_dim)

        def empty() -> jax.Array:
            zeros = jnp.zeros(shape, self.config.dtype)
            return with_logical_constraint(zeros, "layers", "batch", None, "kv_heads", "head_dim")

        return KVCache(
            keys=empty(),
            values=empty(),
            positions=with_logical_constraint(jnp.zeros((B, T), jnp.int32), "batch", None),
            segment_ids=with_logical_constraint(jnp.zeros((B, T), jnp.int32), "batch", None),
            length=jnp.zeros((), jnp.int32),
        )

    def make_pages(self, num_pages: int, page_size: int) -> PagedCache:
        """Returns a `PagedCache` with no rows and `num_pages` empty pages.

        Heads are split over the devices. Every other part of the mesh has all pages, so that rows
        on different devices can share them.
        """
        L, K, H = (
            self.config.num_hidden_layers,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )
        zeros = jnp.zeros((L, num_pages, page_size, K, H), self.config.dtype)
        axes = ("layers", None, None, "kv_heads", "head_dim")
        return PagedCache(
            keys=with_logical_constraint(zeros, *axes),
            values=with_logical_constraint(zeros, *axes),
            page_table=jnp.zeros((0, 1), jnp.int32),
            lengths=jnp.zeros(0, jnp.int32),
        )

    def forward_streams(
        self, streams: Mapping[str, Stream]
    ) -> tuple[dict[str, Float[Array, "_ _ D"]], dict[str, RouterStatistics]]:
        """Applies the decoder to several streams at once, gathering each layer's weights once.

        Args:
          streams: the streams, by name.

        Returns:
          The hidden states [B, S, D] of each stream after the last norm, by name, and the router's
          statistics of each stream, stacked over layers, by name (empty for a model without a
          router).
        """
        hidden, _, statistics = self._forward(streams, dict.fromkeys(streams))
        return hidden, statistics

    def _forward(
        self, streams: Mapping[str, Stream], caches: Mapping[str, Cache | None]
    ) -> tuple[dict[str, jax.Array], dict[str, Cache | None], dict[str, RouterStatistics]]:
        streams = jax.tree.map(jnp.asarray, dict(streams))  # The caller may give NumPy arrays.

        # The caches are carried, not scanned over, so that XLA updates them in place.
        def apply_layer(carried: tuple[dict[str, jax.Array], dict[str, Any]], index, layer):
            hidden, caches, statistics = dict(carried[0]), dict(carried[1]), {}
            for name, stream in streams.items():
                hidden[name], caches[name], routed = layer(
                    hidden[name], stream, caches[name], index
                )
                if routed is not None:
                    statistics[name] = routed
            return (hidden, caches), statistics

        tokens = [jnp.asarray(stream.tokens).reshape(-1) for stream in streams.values()]
        embedded = dict(zip(streams, self.embed(tokens), strict=True))
        start = (embedded, dict(caches))
        (hidden, updated_caches), statistics = self._scan_layers(apply_layer, start)
        rows = {  # [M, D] -> [B, S, D]
            name: self.norm(hidden[name]).reshape(*stream.tokens.shape, -1)
            for name, stream in streams.items()
        }
        return rows, updated_caches, statistics

    def _scan_layers(self, apply_layer: Callable[..., Any], carried: Any) -> tuple[Any, Any]:
        """Applies all layers in turn; returns the last carried value and the stacked statistics."""
        if isinstance(self.layers, nnx.List):
            stacked = []
            for index, layer in enumerate(self.layers):
                carried, statistics = apply_layer(carried, index, layer)
                stacked.append(statistics)
            return carried, jax.tree.map(lambda *parts: jnp.stack(parts), *stacked)
        graph, layers = nnx.split(self.layers)

        def apply_scanned(carried, scanned):
            index, layer_state = scanned
            return apply_layer(carried, index, nnx.merge(graph, layer_state))

        policy = REMAT_POLICIES[self.config.remat]
        if policy is not None:
            apply_scanned = jax.checkpoint(apply_scanned, policy=policy, prevent_cse=False)
        indices = jnp.arange(self.config.num_hidden_layers)
        return jax.lax.scan(apply_scanned, carried, (indices, layers))

    def embed(self, tokens: Sequence[Int[Array, " _"]]) -> list[Float[Array, "_ D"]]:
        """Returns the token embeddings of each stream, in `config.dtype`."""
        table = self.embedding[...].astype(self.config.dtype)
        embedded = self._embed(table, tokens)
        if self.embedding_scale == 1.0:
            return embedded
        scale = jnp.asarray(self.embedding_scale, table.dtype)  # Rounded, as in transformers.
        return [scale * hidden for hidden in embedded]

    def _embed(
        self, table: Float[Array, "V D"], tokens: Sequence[Int[Array, " _"]]
    ) -> list[Float[Array, "_ D"]]:
        if jax.sharding.get_abstract_mesh().empty:
            return embed_tokens(table, list(tokens))
        rows = [partition_spec("batch") for _ in tokens]
        return jax.shard_map(
            _embed_tokens_on_mesh,
            in_specs=(partition_spec(None, "embed"), rows),
            out_specs=[partition_spec("batch", None) for _ in tokens],
            axis_names=set(mesh_axes("batch")),
        )(table, list(tokens))

    def output_projection(self) -> Float[Array, "D V"]:
        """Returns the matrix that maps hidden states to logits.

        Raises:
          HeadError: the model has none.
        """
        self.check_has_head()
        if self.config.tie_word_embeddings:
            return self.embedding[...].T
        return self.head[...]

    def check_has_head(self) -> None:
        """Checks that the model computes logits.

        Raises:
          HeadError: it does not.
        """
        if not self.config.has_lm_head:
            raise HeadError(
                "this model has no language model head (lm_head.weight), so it only embeds: to "
                "generate or score text, add the head of its base model (grit-jax convert from-hf "
                "FOLDER CHECKPOINT --head BASE)"
            )

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Returns the logits of the next token, in `config.logits_dtype`."""
        dtype = self.config.logits_dtype
        projection = self.output_projection().astype(hidden.dtype)
        logits = jnp.einsum("BSD,DV->BSV", hidden, projection, preferred_element_type=dtype)
        return soft_cap(logits, self.config.final_logit_softcapping)

    def project(self, pooled: Float[Array, "texts D"]) -> Float[Array, "texts P"]:
        """Returns the embeddings of pooled texts.

        A model without an embedding projection returns `pooled` unchanged.
        """
        if self.config.embedding_projection_size is None:
            return pooled
        return self.embedding_projection(pooled)


def embed_tokens(
    table: Float[Array, "V D"], tokens: list[Int[Array, " _"]]
) -> list[Float[Array, "_ D"]]:
    """Returns the embeddings of token ids. The gradient of the table is summed in float32."""
    wide = table.astype(jnp.float32)
    return [wide[ids].astype(table.dtype) for ids in tokens]


def _embed_tokens_on_mesh(table: jax.Array, tokens: list[jax.Array]) -> list[jax.Array]:
    """Embeds one device's rows of all streams.

    The table is gathered once for all streams, and its gradient reduced once. Left alone, XLA
    gathers the texts, which are larger, or reduces a whole gradient for each stream.
    """
    return embed_tokens(all_gather_fsdp(table, axis=1), tokens)
