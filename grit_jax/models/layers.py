"""The parts of a decoder layer: normalization, rotary embedding, attention, feed-forward network.

Modules hold the parameters; the mathematics is in plain functions. For dimensions see
`grit_jax.models`.
"""

from __future__ import annotations

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from grit_jax.models.attention import AttentionMask, attention
from grit_jax.models.config import ModelConfig
from grit_jax.models.kv_cache import KVCache
from grit_jax.models.linear import LinearLayers, linear
from grit_jax.models.weights import WeightTable
from grit_jax.sharding import with_logical_constraint


# Recomputed in the backward pass from inputs that are saved anyway: without a matrix product in it,
# that is faster than storing and loading the intermediate values.
@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def rms_norm(
    hidden: Float[Array, "*axes D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*axes D"]:
    """Root-mean-square normalization (arXiv 1910.07467), computed in float32."""
    wide = hidden.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return scale.astype(hidden.dtype) * normalized.astype(hidden.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """Returns SiLU(gate) * up (SwiGLU, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def rotary_embedding(
    heads: Float[Array, "B S heads H"], positions: Int[Array | np.ndarray, "B S"], theta: float
) -> Float[Array, "B S heads H"]:
    """Rotates the pairs (i, i + H/2) of each head by position (arXiv 2104.09864)."""
    half = heads.shape[-1] // 2
    frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned scale."""

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        self.epsilon = config.rms_norm_eps
        self.scale = weights[f"{scope}.scale"].initialize(config, rngs)

    def __call__(self, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """Returns the normalized hidden states."""
        return rms_norm(hidden, self.scale[...], self.epsilon)


class Attention(LinearLayers):
    """Grouped-query attention with rotary positions; the caller chooses the mask."""

    def __call__(
        self,
        hidden: Float[Array, "M D"],
        mask: AttentionMask,
        cache: KVCache | None,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "M D"], KVCache | None]:
        """Returns the output of attention, and the cache with this layer's new keys and values.

        Args:
          hidden: hidden states of the tokens.
          mask: which keys each token attends to.
          cache: a cache whose last reserved slots are for these tokens. All its slots are keys.
            Without a cache, the keys are those of the tokens.
          layer: index of the layer, for the cache.
        """
        theta, positions = self.config.rope_theta, mask.positions
        B, S = positions.shape

        def heads(name: str, axis: str) -> Float[Array, "B S heads H"]:
            projected = linear(hidden, self.weight(name))  # [M, heads, H]
            projected = projected.reshape(B, S, *projected.shape[1:])
            return with_logical_constraint(projected, "batch", None, axis, None)

        query, key = heads("query", "heads"), heads("key", "kv_heads")
        value = heads("value", "kv_heads")
        query = rotary_embedding(query, positions, theta)
        key = rotary_embedding(key, positions, theta)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.layer_keys_and_values(layer)
        mixed = attention(
            query,
            key,
            value,
            mask,
            self.config.attention_implementation,
            self.config.splash_block_size,
        )
        mixed = mixed.reshape(B * S, *mixed.shape[2:])  # [B, S, N, H] -> [M, N, H]
        return linear(mixed, self.weight("output")), cache


class MLP(LinearLayers):
    """The gated feed-forward network of Llama and Mistral (SwiGLU, arXiv 2002.05202)."""

    def __call__(
        self, hidden: Float[Array, "M D"], is_token: Bool[Array, " M"]
    ) -> tuple[Float[Array, "M D"], None]:
        """Returns the transformed states; None stands for the statistics of a router."""
        del is_token  # Skipping padding would save nothing in a dense product.
        gate = linear(hidden, self.weight("gate"))
        up = linear(hidden, self.weight("up"))
        activated = with_logical_constraint(swiglu(gate, up), "batch", "mlp")
        return linear(activated, self.weight("down")), None


class EmbeddingProjection(nnx.Module):
    """A linear layer, with a bias, from hidden states to embeddings.

    It is applied after pooling. Since pooling takes a mean, that equals applying it to every token,
    at a fraction of the cost.
    """

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        self.weight = weights[f"{scope}.weight"].initialize(config, rngs)
        self.bias = weights[f"{scope}.bias"].initialize(config, rngs)

    def __call__(self, pooled: Float[Array, "texts D"]) -> Float[Array, "texts P"]:
        """Returns the projected embeddings, not normalized."""
        weight, bias = self.weight[...].astype(pooled.dtype), self.bias[...].astype(pooled.dtype)
        return jnp.einsum("TD,DP->TP", pooled, weight) + bias
