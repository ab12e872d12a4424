"""The parts of a decoder layer: normalization, attention, feed-forward network.

Modules hold the parameters; the mathematics is in plain functions. For dimensions see
`grit_jax.models`.
"""

from __future__ import annotations

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.attention import AttentionMask, attention
from grit_jax.models.config import ModelConfig
from grit_jax.models.linear import LinearLayers, linear
from grit_jax.models.paged_cache import Cache
from grit_jax.models.rotary import rotary_embedding, text_lengths
from grit_jax.models.weights import WeightTable
from grit_jax.sharding import with_logical_constraint


# Recomputed in the backward pass from inputs that are saved anyway: without a matrix product in it,
# that is faster than storing and loading the intermediate values.
@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def rms_norm(
    hidden: Float[Array, "*axes D"],
    scale: Float[Array, " D"],
    epsilon: float,
    is_centered: bool = False,
) -> Float[Array, "*axes D"]:
    """Root-mean-square normalization (arXiv 1910.07467), computed in float32.

    Args:
      hidden: hidden states.
      scale: what they are multiplied by.
      epsilon: added to the mean square.
      is_centered: whether 1 is to be added to `scale`.
    """
    wide = hidden.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    if is_centered:  # In float32, since 1 + scale has few digits in bfloat16.
        return ((1.0 + scale.astype(jnp.float32)) * normalized).astype(hidden.dtype)
    return scale.astype(hidden.dtype) * normalized.astype(hidden.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """Returns SiLU(gate) * up (SwiGLU, arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


@functools.partial(jax.checkpoint, prevent_cse=False)
def geglu(gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """Returns GELU(gate) * up (GEGLU, arXiv 2002.05202), GELU by its approximation with tanh."""
    return jax.nn.gelu(gate, approximate=True) * up


def soft_cap(logits: Float[Array, "*axes"], cap: float | None) -> Float[Array, "*axes"]:
    """Returns logits smoothly bounded to (-cap, cap); unchanged without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned scale.

    A scale that the table of weights initializes to zeros is stored minus 1 (Gemma).
    """

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        spec = weights[f"{scope}.scale"]
        self.epsilon = config.rms_norm_eps
        self.is_centered = spec.init == "zeros"
        self.scale = spec.initialize(config, rngs)

    def __call__(self, hidden: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """Returns the normalized hidden states."""
        return rms_norm(hidden, self.scale[...], self.epsilon, self.is_centered)


class Attention(LinearLayers):
    """Grouped-query attention with rotary positions; the caller chooses the mask.

    The architecture's table of weights says whether queries, keys and values have a bias (Qwen2),
    and whether each head of queries and keys is normalized (Qwen3).
    """

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        super().__init__(config, weights, scope, rngs=rngs)
        for name in ("query", "key", "value"):
            if f"{scope}.{name}_bias" in weights:
                bias = weights[f"{scope}.{name}_bias"].initialize(config, rngs)
                setattr(self, f"{name}_bias", bias)
            if f"{scope}.{name}_norm.scale" in weights:
                setattr(
                    self,
                    f"{name}_norm",
                    RMSNorm(config, weights, f"{scope}.{name}_norm", rngs=rngs),
                )

    def __call__(
        self,
        hidden: Float[Array, "M D"],
        mask: AttentionMask,
        cache: Cache | None,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "M D"], Cache | None]:
        """Returns the output of attention, and the cache with this layer's new keys and values.

        Args:
          hidden: hidden states of the tokens.
          mask: which keys each token attends to.
          cache: a cache whose last reserved slots are for these tokens. All its slots are keys.
            Without a cache, the keys are those of the tokens.
          layer: index of the layer, for the cache.
        """
        positions, B, S = mask.positions, *mask.positions.shape

        def heads(name: str, axis: str) -> Float[Array, "B S heads H"]:
            projected = linear(hidden, self.weight(name))  # [M, heads, H]
            if (bias := getattr(self, f"{name}_bias", None)) is not None:
                projected += bias[...].astype(projected.dtype)
            projected = projected.reshape(B, S, *projected.shape[1:])
            projected = with_logical_constraint(projected, "batch", None, axis, None)
            norm = getattr(self, f"{name}_norm", None)
            return projected if norm is None else norm(projected)

        query, key = heads("query", "heads"), heads("key", "kv_heads")
        value = heads("value", "kv_heads")
        frequencies, amplitude = self.config.rotary_frequencies(), self.config.rotary_amplitude
        scaling = self.config.rope_scaling
        if scaling is not None and scaling.depends_on_length:
            lengths = text_lengths(positions, mask.segment_ids)
            frequencies = scaling.scale_by_length(frequencies, lengths)
        if self.config.rope_local_base_freq is not None:
            local = self.config.local_rotary_frequencies()
            frequencies = jnp.where(mask.is_sliding, local, frequencies)
            amplitude = jnp.where(mask.is_sliding, 1.0, amplitude)
        query = rotary_embedding(query, positions, frequencies, amplitude)
        key = rotary_embedding(key, positions, frequencies, amplitude)
        if scaling is not None and scaling.llama_4_scaling_beta is not None:
            query *= scaling.query_scale(positions).astype(query.dtype)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.layer_keys_and_values(layer)
        scalar = self.config.query_pre_attn_scalar
        mixed = attention(
            query,
            key,
            value,
            mask,
            self.config.attention_implementation,
            self.config.splash_block_size,
            None if scalar is None else scalar**-0.5,
        )
        mixed = mixed.reshape(B * S, *mixed.shape[2:])  # [B, S, N, H] -> [M, N, H]
        return linear(mixed, self.weight("output")), cache


class MLP(LinearLayers):
    """The gated feed-forward network of Llama and Mistral (SwiGLU, arXiv 2002.05202)."""

    activation = staticmethod(swiglu)

    def __call__(
        self, hidden: Float[Array, "M D"], is_token: Bool[Array, " M"]
    ) -> tuple[Float[Array, "M D"], None]:
        """Returns the transformed states; None stands for the statistics of a router."""
        del is_token  # Skipping padding would save nothing in a dense product.
        gate = linear(hidden, self.weight("gate"))
        up = linear(hidden, self.weight("up"))
        activated = with_logical_constraint(self.activation(gate, up), "batch", "mlp")
        return linear(activated, self.weight("down")), None


class GegluMLP(MLP):
    """The gated feed-forward network of Gemma (GEGLU, arXiv 2002.05202)."""

    activation = staticmethod(geglu)


class EmbeddingProjection(nnx.Module):
    """Linear layers, one or two, from hidden states to embeddings.

    They are applied after pooling. Since pooling takes a mean, that equals applying them to every
    token, at a fraction of the cost.
    """

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        for name in ("hidden_weight", "hidden_bias", "weight", "bias"):
            if f"{scope}.{name}" in weights:
                setattr(self, name, weights[f"{scope}.{name}"].initialize(config, rngs))

    def __call__(self, pooled: Float[Array, "texts D"]) -> Float[Array, "texts P"]:
        """Returns the projected embeddings, not normalized."""
        for layer in ("hidden_", ""):
            weight = getattr(self, f"{layer}weight", None)
            bias = getattr(self, f"{layer}bias", None)
            if weight is not None:
                pooled = jnp.einsum("TD,DP->TP", pooled, weight[...].astype(pooled.dtype))
            if bias is not None:
                pooled += bias[...].astype(pooled.dtype)
        return pooled
