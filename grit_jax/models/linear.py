"""Linear layers, with optional low-rank updates (LoRA, arXiv 2106.09685) and int8 weights.

A layer computes y = x W, and with an update y = x W + (alpha / rank) (x A) B. The update is never
added to W: W may be in bfloat16, which would round small updates away. B starts at 0, so an
untrained update changes nothing. For dimensions see `grit_jax.models`.
"""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8
import numpy as np

from grit_jax.models.config import ModelConfig
from grit_jax.models.weights import LAYERS, WeightSpec, WeightTable, linear_layers
from grit_jax.sharding import with_logical_constraint

# (W,), or (W, (alpha / rank) A, B) for a layer with a low-rank update.
Weight = tuple[Array, ...]


def linear(inputs: Float[Array, " M *inputs"], weight: Weight) -> Float[Array, " M *outputs"]:
    """Returns x W, plus (alpha / rank) (x A) B for a layer with a low-rank update.

    Args:
      inputs: x. All its axes but the first are contracted with the first axes of W.
      weight: the result of `LinearLayers.weight`.
    """
    matrix, *update = weight
    # Not an einsum: that contracts heads and head dimension in alphabetical order, for which XLA
    # transposes W in every call.
    outputs = jnp.tensordot(inputs, matrix, inputs.ndim - 1)
    if not update:
        return outputs
    a, b = update
    narrow = jnp.tensordot(inputs, a, a.ndim - 1)  # [M, rank]
    narrow = with_logical_constraint(narrow, "batch", None)
    return outputs + jnp.tensordot(narrow, b, 1)


def round_to_int8(
    matrix: Float[np.ndarray, "*inputs_and_outputs"], num_inputs: int
) -> tuple[Int8[np.ndarray, "*inputs_and_outputs"], Float32[np.ndarray, "*ones_and_outputs"]]:
    """Returns W rounded to int8, and the scale of each output.

    Args:
      matrix: W.
      num_inputs: number of its input axes, which come first.
    """
    wide = np.asarray(matrix, np.float32)
    largest = np.abs(wide).max(axis=tuple(range(num_inputs)), keepdims=True)
    scales = np.maximum(largest, np.finfo(np.float32).tiny) / 127
    return np.rint(wide / scales).astype(np.int8), scales


class LoRA(nnx.Module):
    """The matrices A and B of one linear layer, or of each expert, in float32."""

    def __init__(self, spec: WeightSpec, config: ModelConfig, rank: int, *, rngs: nnx.Rngs):
        axes, shape = spec.axes, spec.shape(config)
        stack, middle = spec.num_stack_axes, spec.num_stack_axes + spec.num_inputs
        a = jax.random.normal(rngs.lora(), (*shape[:middle], rank))
        a *= spec.fan_in(config) ** -0.5  # x A has the scale of x.
        b = jnp.zeros((*shape[:stack], rank, *shape[middle:]))
        a_axes, b_axes = (*axes[:middle], "lora"), (*axes[:stack], "lora", *axes[middle:])
        self.a = nnx.LoRAParam(a, out_sharding=a_axes, eager_sharding=False)
        self.b = nnx.LoRAParam(b, out_sharding=b_axes, eager_sharding=False)


class LinearLayers(nnx.Module):
    """A module of linear layers, created from the table of weights.

    The layer "query" has its W in the attribute `query`, a low-rank update in `query_lora`, and the
    scales of an int8 W in `query_scale`.
    """

    def __init__(self, config: ModelConfig, weights: WeightTable, scope: str, *, rngs: nnx.Rngs):
        """Creates the linear layers whose paths begin with `scope`, such as "layers.attention"."""
        self.config = config
        layers = linear_layers(weights)
        with_update = () if config.lora is None else config.lora.matching(layers)
        prefix = f"{scope.removeprefix(LAYERS)}."
        for layer, spec in layers.items():
            if not layer.startswith(prefix):
                continue
            name = layer.removeprefix(prefix)
            if config.linear_dtype == "int8" and spec.int8:
                weight, scale = _int8_parameters(spec, config)
                setattr(self, f"{name}_scale", scale)
            else:
                weight = spec.initialize(config, rngs)
            setattr(self, name, weight)
            if config.lora is not None and layer in with_update:
                setattr(self, f"{name}_lora", LoRA(spec, config, config.lora.rank, rngs=rngs))

    def weight(self, name: str, dtype: str | None = None) -> Weight:
        """Returns the matrices of a layer in `dtype`, by default `config.dtype`."""
        dtype = dtype or self.config.dtype
        matrix = getattr(self, name)[...].astype(dtype)
        int8_scale = getattr(self, f"{name}_scale", None)
        if int8_scale is not None:
            matrix *= int8_scale[...].astype(dtype)
        update = getattr(self, f"{name}_lora", None)
        if update is None or self.config.lora is None:
            return (matrix,)
        lora_scale = self.config.lora.alpha / self.config.lora.rank
        return matrix, (lora_scale * update.a[...]).astype(dtype), update.b[...].astype(dtype)


def _int8_parameters(spec: WeightSpec, config: ModelConfig) -> tuple[nnx.Param, nnx.Param]:
    """Returns the parameters of an int8 layer, W and scales, whose values are loaded later."""
    axes, shape = spec.axes, spec.shape(config)
    stack, middle = spec.num_stack_axes, spec.num_stack_axes + spec.num_inputs
    scale_shape = (*shape[:stack], *(1,) * spec.num_inputs, *shape[middle:])
    scale_axes = (*axes[:stack], *(None,) * spec.num_inputs, *axes[middle:])
    return (
        nnx.Param(jnp.zeros(shape, jnp.int8), out_sharding=axes, eager_sharding=False),
        nnx.Param(jnp.ones(scale_shape), out_sharding=scale_axes, eager_sharding=False),
    )
