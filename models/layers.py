"""What a decoder layer is made of: normalisation, rotary positions, attention, feed-forward.

Modules own parameters and the names of their axes; the mathematics is in plain functions.

Legend of dimensions: B rows, S positions, D hidden, N query heads, K key/value heads, H head
dimension, F feed-forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.attention import attention
from grit_jax.sharding import constrain

if TYPE_CHECKING:
    from grit_jax.models.mistral import MistralConfig


def parameter(
    key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], config: MistralConfig
) -> nnx.Param:
    """Returns a normally distributed weight whose axes are named `axes`."""
    value = config.initializer_range * jax.random.normal(key, shape, config.param_dtype)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def rms_norm(
    hidden: Float[Array, "... D"], scale: Float[Array, D], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32."""
    wide = hidden.astype(jnp.float32)
    normalized = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return scale.astype(hidden.dtype) * normalized.astype(hidden.dtype)


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

    def __init__(self, config: MistralConfig):
        self.config = config
        scale = jnp.ones(config.hidden_size, config.param_dtype)
        self.scale = nnx.Param(scale, out_sharding=("norm",), eager_sharding=False)

    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the normalised states."""
        return rms_norm(hidden, self.scale[...], self.config.rms_norm_eps)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; what may be seen is the caller's mask."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.query = parameter(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), config)
        self.key = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), config)
        self.value = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), config)
        self.output = parameter(rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), config)

    def __call__(
        self,
        hidden: Float[Array, "B S D"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B S S"],
    ) -> Float[Array, "B S D"]:
        """Returns what each position gathers from those that `mask` lets it see."""
        dtype, theta = self.config.dtype, self.config.rope_theta
        query = jnp.einsum("BSD,DNH->BSNH", hidden, self.query[...].astype(dtype))
        key = jnp.einsum("BSD,DKH->BSKH", hidden, self.key[...].astype(dtype))
        value = jnp.einsum("BSD,DKH->BSKH", hidden, self.value[...].astype(dtype))
        query = constrain(query, "batch", None, "heads", "head_dim")
        key = constrain(key, "batch", None, "kv_heads", "head_dim")
        value = constrain(value, "batch", None, "kv_heads", "head_dim")
        query = rotary_embedding(query, positions, theta)
        key = rotary_embedding(key, positions, theta)
        mixed = attention(query, key, value, mask)
        return jnp.einsum("BSNH,NHD->BSD", mixed, self.output[...].astype(dtype))


class MLP(nnx.Module):
    """The gated feed-forward network of Llama and Mistral (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F = config.hidden_size, config.intermediate_size
        self.gate = parameter(rngs.params(), (D, F), ("embed", "mlp"), config)
        self.up = parameter(rngs.params(), (D, F), ("embed", "mlp"), config)
        self.down = parameter(rngs.params(), (F, D), ("mlp", "embed"), config)

    def __call__(
        self, hidden: Float[Array, "B S D"], is_token: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], None]:
        """Returns the transformed states, and None in the place of a router's statistics."""
        del is_token  # Padding costs nothing here that could be left out.
        dtype = self.config.dtype
        gate = jnp.einsum("BSD,DF->BSF", hidden, self.gate[...].astype(dtype))
        up = jnp.einsum("BSD,DF->BSF", hidden, self.up[...].astype(dtype))
        activated = constrain(jax.nn.silu(gate) * up, "batch", None, "mlp")
        return jnp.einsum("BSF,FD->BSD", activated, self.down[...].astype(dtype)), None
