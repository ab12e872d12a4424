"""What a decoder layer is made of: normalisation, rotary positions, attention, feed-forward.

Modules own parameters and the names of their axes; the mathematics is in plain functions.

Legend of dimensions: B rows, S positions, T slots of a cache (S without one), M tokens (B x S),
D hidden, N query heads, K key/value heads, H head dimension, F feed-forward, T texts,
P embedding.

Hidden states are [M, D], rows one after the other: only attention looks at more than one token, and
a weight's gradient that sums over one axis in place of two takes a third of the time on a CPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.attention import AttentionMask, attention
from grit_jax.models.linear import LinearLayers, linear
from grit_jax.sharding import with_logical_constraint

if TYPE_CHECKING:
    from grit_jax.models.kv_cache import KVCache
    from grit_jax.models.decoder import ModelConfig


def parameter(
    rngs: nnx.Rngs,
    config: ModelConfig,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    standard_deviation: float,
) -> nnx.Param:
    """Returns a normally distributed weight whose axes are named `axes`."""
    value = standard_deviation * jax.random.normal(rngs.params(), shape, config.param_dtype)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def fan_in_std(fan_in: int) -> float:
    """Returns the standard deviation that keeps the scale of what a weight is applied to."""
    return fan_in**-0.5


def residual_std(fan_in: int, config: ModelConfig) -> float:
    """Returns the standard deviation for a branch's last weight.

    The 2L branches that are added to a token's embedding are together no larger than it (GPT-2):
    before training a text is nearly the bag of its tokens, which is where learning starts well.
    """
    return fan_in_std(fan_in) * (2 * config.num_hidden_layers) ** -0.5


# Computed again in the backward pass, from arguments that are there anyway: without products in it,
# that takes less time than to write and read what lies in between.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(
    hidden: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""
    wide = hidden.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return scale.astype(hidden.dtype) * normalized.astype(hidden.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """Returns `up` times SiLU of `gate` (SwiGLU, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def rotary_embedding(
    heads: Float[Array, "B S N H"], positions: Int[Array, "B S"], theta: float
) -> Float[Array, "B S N H"]:
    """Rotates pairs (i, i + H/2) of each head by position (arXiv 2104.09864, Hugging Face's)."""
    half = heads.shape[-1] // 2
    frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, config: ModelConfig):
        self.config = config
        scale = jnp.ones(config.hidden_size, config.param_dtype)
        self.scale = nnx.Param(scale, out_sharding=("norm",), eager_sharding=False)

    def __call__(self, hidden: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """Returns the normalised states."""
        return rms_norm(hidden, self.scale[...], self.config.rms_norm_eps)


class Attention(LinearLayers):
    """Grouped-query attention with rotary positions; what may be seen is the caller's choice."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        weight = functools.partial(parameter, rngs, config)
        self.query = weight((D, N, H), ("embed", "heads", "head_dim"), fan_in_std(D))
        self.key = weight((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in_std(D))
        self.value = weight((D, K, H), ("embed", "kv_heads", "head_dim"), fan_in_std(D))
        self.output = weight(
            (N, H, D), ("heads", "head_dim", "embed"), residual_std(N * H, config)
        )
        self.adapt("attention", rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "M D"],
        visibility: AttentionMask,
        cache: KVCache | None,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "M D"], KVCache | None]:
        """Returns what each position gathers from the keys that it may see, and the cache.

        Without a cache the keys are those of the positions themselves; with one, those in all its
        slots, after this layer's new ones have been put into the slots taken last.
        """
        theta, positions = self.config.rope_theta, visibility.positions
        B, S = positions.shape
        query = linear(hidden, self.weight("query"))
        key = linear(hidden, self.weight("key"))
        value = linear(hidden, self.weight("value"))
        # [M, heads, H] -> [B, S, heads, H]
        query = with_logical_constraint(query.reshape(B, S, *query.shape[1:]), "batch", None, "heads", None)
        key = with_logical_constraint(key.reshape(B, S, *key.shape[1:]), "batch", None, "kv_heads", None)
        value = with_logical_constraint(value.reshape(B, S, *value.shape[1:]), "batch", None, "kv_heads", None)
        query = rotary_embedding(query, positions, theta)
        key = rotary_embedding(key, positions, theta)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.layer_keys_and_values(layer)
        mixed = attention(
            query,
            key,
            value,
            visibility,
            self.config.attention_implementation,
            self.config.splash_block_size,
        )
        mixed = mixed.reshape(B * S, *mixed.shape[2:])  # [B, S, N, H] -> [M, N, H]
        return linear(mixed, self.weight("output")), cache


class MLP(LinearLayers):
    """The gated feed-forward network of Llama and Mistral (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.hidden_size, config.intermediate_size
        weight = functools.partial(parameter, rngs, config)
        self.gate = weight((D, F), ("embed", "mlp"), fan_in_std(D))
        self.up = weight((D, F), ("embed", "mlp"), fan_in_std(D))
        self.down = weight((F, D), ("mlp", "embed"), residual_std(F, config))
        self.adapt("feed_forward", rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "M D"], is_token: Bool[Array, " M"]
    ) -> tuple[Float[Array, "M D"], None]:
        """Returns the transformed states, and None in the place of a router's statistics."""
        del is_token  # Padding costs nothing here that could be left out.
        gate = linear(hidden, self.weight("gate"))
        up = linear(hidden, self.weight("up"))
        activated = with_logical_constraint(swiglu(gate, up), "batch", "mlp")
        return linear(activated, self.weight("down")), None


class EmbeddingProjection(nnx.Module):
    """A linear layer, with a bias, from the size of hidden states to that of embeddings.

    It is applied to pooled texts. Pooling takes a mean, so this is the same as applying it to
    every token before, for a fraction of the products.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, P = config.hidden_size, config.embedding_projection_size
        assert P is not None
        axes = ("embed", "embedding")
        self.weight = parameter(rngs, config, (D, P), axes, fan_in_std(D))
        bias = jnp.zeros(P, config.param_dtype)
        self.bias = nnx.Param(bias, out_sharding=("embedding",), eager_sharding=False)

    def __call__(self, pooled: Float[Array, "T D"]) -> Float[Array, "T P"]:
        """Returns the projected embeddings, not normalised."""
        weight, bias = self.weight[...].astype(pooled.dtype), self.bias[...].astype(pooled.dtype)
        return jnp.einsum("TD,DP->TP", pooled, weight) + bias
