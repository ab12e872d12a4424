"""Mistral (arXiv 2310.06825): a decoder whose attention is causal or bidirectional by argument.

Legend of dimensions: B rows, S positions, M tokens (B x S), D hidden, V vocabulary, L layers,
T texts, P embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, cast, overload

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.attention import IMPLEMENTATIONS, SPLASH_BLOCK_SIZE, AttentionMask
from grit_jax.models.kv_cache import KVCache
from grit_jax.models.layers import (
    MLP,
    Attention,
    EmbeddingProjection,
    RMSNorm,
    fan_in_std,
    parameter,
)
from grit_jax.models.linear import LoraConfig
from grit_jax.models.remat import REMAT_POLICIES
from grit_jax.models.splash import LANES
from grit_jax.sharding import with_logical_constraint, all_gather_fsdp, mesh_axes, partition_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a Mistral, under the names of Hugging Face's config.json; the defaults are 7B's.

    `max_position_embeddings` is the longest text that the model is made for, in tokens.
    `initializer_range` is the standard deviation of an untrained model's embeddings; its other
    weights are scaled by their inputs. `embedding_projection_size` is the size of embeddings where
    a linear layer makes them of pooled hidden states. `dtype` is the type of the computation,
    `param_dtype` that of the parameters and `logits_dtype` that of the logits. `remat` names what a
    layer's backward pass finds saved (`remat.REMAT_POLICIES`), and `attention_implementation` is
    one of `attention.IMPLEMENTATIONS`; `splash_block_size` is the most positions in a block of the
    kernel for TPUs. `lora` says which linear layers are adapted, None for none.
    `linear_dtype` "int8" is for weights that were trained: those of linear layers are int8, with a
    scale for each output (`linear.round_to_int8`); None leaves them in `param_dtype`.

    `linear_layers` has the names of a decoder layer's linear layers, and how many axes of the
    weight of each are inputs. `may_be_zero` has the fields that need not be positive.

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
    embedding_projection_size: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    remat: str = "full"
    attention_implementation: str = "auto"
    splash_block_size: int = SPLASH_BLOCK_SIZE
    lora: LoraConfig | None = None
    linear_dtype: str | None = None

    linear_layers: ClassVar[Mapping[str, int]] = {
        "attention.query": 1,
        "attention.key": 1,
        "attention.value": 1,
        "attention.output": 2,
        "feed_forward.gate": 1,
        "feed_forward.up": 1,
        "feed_forward.down": 1,
    }
    may_be_zero: ClassVar[Collection[str]] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if value < 0 or (value == 0 and field.name not in self.may_be_zero):
                raise ValueError(f"config.model.{field.name} must be positive, not {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.model.head_dim={self.head_dim} must be even, to be rotated")
        for name in ("dtype", "param_dtype", "logits_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(
                    f"config.model.{name}={getattr(self, name)!r} must be 'float32' or 'bfloat16'"
                )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"config.model.remat={self.remat!r} must be one of {sorted(REMAT_POLICIES)}"
            )
        if self.attention_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"config.model.attention_implementation={self.attention_implementation!r} must be "
                f"one of {', '.join(IMPLEMENTATIONS)}"
            )
        if self.linear_dtype not in (None, "int8"):
            raise ValueError(
                f"config.model.linear_dtype={self.linear_dtype!r} must be 'int8', or None for "
                "that of the other parameters"
            )
        if self.splash_block_size % LANES:
            raise ValueError(
                f"config.model.splash_block_size={self.splash_block_size} must be a multiple of "
                f"{LANES}"
            )
        if self.lora is not None:
            self.lora.targeted(self.linear_layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows of tokens that are read in one way.

    Attributes:
      tokens: token ids.
      segment_ids: which text of its row a token belongs to, from 1 on; 0 is padding.
      positions: position of each token in its own text, from 0 on.
      is_causal: whether a token sees only those before it, or all of its text.
      causal_tokens: tokens that see only those before them even so.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    is_causal: bool = dataclasses.field(metadata={"static": True})
    causal_tokens: Bool[Array, "B S"] | None = None


class DecoderLayer(nnx.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual connection."""

    def __init__(self, config: ModelConfig, feed_forward: type[nnx.Module], *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = cast(Any, feed_forward)(config, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "M D"],
        stream: Stream,
        cache: KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "M D"], KVCache | None, Any]:
        """Returns the next hidden states, the cache with this layer's keys and values, statistics.

        The statistics are the router's, None without a router.
        """
        visibility = AttentionMask(
            stream.segment_ids,
            stream.positions,
            stream.is_causal,
            stream.causal_tokens,
            self.config.sliding_window,
            cached=None if cache is None else (cache.segment_ids, cache.positions),
        )
        update, cache = self.attention(self.attention_norm(hidden), visibility, cache, layer)
        hidden += update
        update, statistics = self.feed_forward(
            self.feed_forward_norm(hidden), stream.segment_ids.reshape(-1) > 0
        )
        return with_logical_constraint(hidden + update, "batch", None), cache, statistics


class Decoder(nnx.Module):
    """The decoder without its loss: token ids to hidden states, hidden states to logits.

    `layers` is one module whose parameters have an axis for the layers, or an `nnx.List` of a
    module for each, which is read in the same way.
    """

    feed_forward: ClassVar[type[nnx.Module]] = MLP

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, V = config.hidden_size, config.vocab_size

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, self.feed_forward, rngs=rngs)

        self.embedding = parameter(
            rngs, config, (V, D), ("vocab", "embed"), config.initializer_range
        )
        self.layers: DecoderLayer | nnx.List = stacked_layers(rngs)
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.head = parameter(rngs, config, (D, V), ("embed", "vocab"), fan_in_std(D))
        if config.embedding_projection_size is not None:
            self.embedding_projection = EmbeddingProjection(config, rngs=rngs)

    @overload
    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        is_causal: bool = True,
        cache: None = None,
    ) -> Float[Array, "B S D"]: ...

    @overload
    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        is_causal: bool = True,
        *,
        cache: KVCache,
    ) -> tuple[Float[Array, "B S D"], KVCache]: ...

    def __call__(self, tokens, positions=None, segment_ids=None, is_causal=True, cache=None):
        """Returns the hidden states after the last norm; with a cache, also the cache after them.

        With a cache the tokens see, besides each other, those of their text that earlier calls
        left there. What was read stays as it was: a document may be read bidirectionally, and a
        question after it causally.

        Args:
          tokens: token ids.
          positions: position of each token in its text; by default its place in the row, padding
            not counted; with a cache, from the row's last token on.
          segment_ids: which text of its row a token belongs to, 0 for padding; by default the row
            is one text, 1.
          is_causal: whether a token sees only those before it, or all of its text.
          cache: what `make_cache` made or an earlier call returned. In a jitted function the
            caller has to see to it that it has room (`cache.length` + S <= `cache.num_slots`):
            tokens that do not fit overwrite the last slots. `cache.length` counts them all the
            same, and tells afterwards.

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

        Made in a jitted function, it is never whole on one device of a mesh.
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

    def forward_streams(
        self, streams: Mapping[str, Stream]
    ) -> tuple[dict[str, Float[Array, "B S D"]], dict[str, Any]]:
        """Applies the decoder to several streams at once, gathering each layer's weights once.

        Args:
          streams: the streams, by name.

        Returns:
          The hidden states of each stream after the last norm, by name, and the router's statistics
          of each stream, stacked over layers, by name (empty for a model without a router).
        """
        hidden, _, statistics = self._forward(streams, dict.fromkeys(streams))
        return hidden, statistics

    def _forward(
        self, streams: Mapping[str, Stream], caches: Mapping[str, KVCache | None]
    ) -> tuple[dict[str, jax.Array], dict[str, KVCache | None], dict[str, Any]]:
        # The caches are carried, not scanned over, so that XLA updates them in place.
        def apply_layer(carried: tuple[dict[str, jax.Array], dict[str, Any]], number, layer):
            hidden, caches, statistics = dict(carried[0]), dict(carried[1]), {}
            for name, stream in streams.items():
                hidden[name], caches[name], routed = layer(
                    hidden[name], stream, caches[name], number
                )
                if routed is not None:
                    statistics[name] = routed
            return (hidden, caches), statistics

        tokens = [stream.tokens.reshape(-1) for stream in streams.values()]
        embedded = dict(zip(streams, self.embed(tokens), strict=True))
        (hidden, caches), statistics = self._scan_layers(apply_layer, (embedded, dict(caches)))
        rows = {  # [M, D] -> [B, S, D]
            name: self.norm(hidden[name]).reshape(*stream.tokens.shape, -1)
            for name, stream in streams.items()
        }
        return rows, caches, statistics

    def _scan_layers(self, apply_layer: Callable[..., Any], carried: Any) -> tuple[Any, Any]:
        """Returns what is carried through all layers, and what each returns, stacked."""
        if isinstance(self.layers, nnx.List):
            returned = []
            for number, layer in enumerate(self.layers):
                carried, statistics = apply_layer(carried, number, layer)
                returned.append(statistics)
            return carried, jax.tree.map(lambda *parts: jnp.stack(parts), *returned)
        graph, layers = nnx.split(self.layers)

        def read_scanned(carried, scanned):
            number, layer_state = scanned
            return apply_layer(carried, number, nnx.merge(graph, layer_state))

        policy = REMAT_POLICIES[self.config.remat]
        if policy is not None:
            read_scanned = jax.checkpoint(read_scanned, policy=policy, prevent_cse=False)
        numbers = jnp.arange(self.config.num_hidden_layers)
        return jax.lax.scan(read_scanned, carried, (numbers, layers))

    def embed(self, tokens: Sequence[Int[Array, " M"]]) -> list[Float[Array, "M D"]]:
        """Returns the embedding of each token of some streams, in the type of the computation."""
        table = self.embedding[...].astype(self.config.dtype)
        if jax.sharding.get_abstract_mesh().empty:
            return embed_tokens(table, list(tokens))
        rows = [partition_spec("batch") for _ in tokens]
        return jax.shard_map(
            look_up_on_mesh,
            in_specs=(partition_spec(None, "embed"), rows),
            out_specs=[partition_spec("batch", None) for _ in tokens],
            axis_names=set(mesh_axes("batch")),
        )(table, list(tokens))

    def output_projection(self) -> Float[Array, "D V"]:
        """Returns the matrix that turns hidden states into logits."""
        if self.config.tie_word_embeddings:
            return self.embedding[...].T
        return self.head[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Returns the scores of each next token, in the type `logits_dtype`."""
        dtype = self.config.logits_dtype
        projection = self.output_projection().astype(hidden.dtype)
        return jnp.einsum("BSD,DV->BSV", hidden, projection, preferred_element_type=dtype)

    def project(self, pooled: Float[Array, "T D"]) -> Float[Array, "T P"]:
        """Returns the embeddings of texts whose hidden states have been pooled.

        They are `pooled` itself in a model without an `embedding_projection`.
        """
        if self.config.embedding_projection_size is None:
            return pooled
        return self.embedding_projection(pooled)


def embed_tokens(
    table: Float[Array, "V D"], tokens: list[Int[Array, " M"]]
) -> list[Float[Array, "M D"]]:
    """Returns the rows of these numbers; the gradients of a row are added up in float32."""
    wide = table.astype(jnp.float32)
    return [wide[numbers].astype(table.dtype) for numbers in tokens]


def look_up_on_mesh(table: jax.Array, tokens: list[jax.Array]) -> list[jax.Array]:
    """What each device looks up for its rows, of all streams.

    The table is gathered once for all of them, and its gradient reduced once. Left to itself, the
    compiler gathers the texts, which are larger, or reduces a whole gradient for each stream.
    """
    return embed_tokens(all_gather_fsdp(table, axis=1), tokens)
