"""The declaration of every weight: its axes, its initialization and its Hugging Face name.

A model's table of weights maps the path of a parameter, such as "layers.attention.query", to its
`WeightSpec`. Modules create their parameters from it; sharding, LoRA, int8, checkpoint conversion
and the count of operations follow from it as well.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from grit_jax.models.config import ModelConfig

# Parameters under this path are stacked over the decoder's layers.
LAYERS = "layers."

# The folders in which sentence-transformers stores the linear layers that follow pooling, in order.
# The names of their tensors begin with the folder's.
DENSE = ("2_Dense", "3_Dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """The declaration of one weight.

    Attributes:
      axes: logical axes (`sharding.LOGICAL_AXIS_RULES`), without the axis of the layers. The matrix
        of a linear layer has its inputs first; "experts" precedes them.
      name: name of the tensor in Hugging Face checkpoints, with {layer} and {expert} for numbers.
      num_inputs: number of input axes of a linear layer's matrix; 0 for any other weight.
      init: "fan_in" keeps the scale of the inputs; "residual" scales a branch that is added to the
        residual stream; "embedding" uses `config.initializer_range`; "ones"; "zeros".
      is_flat: whether the tensor has one axis for all of `axes`, as a bias of heads has.
      int8: whether `config.linear_dtype="int8"` applies to this matrix.
    """

    axes: tuple[str, ...]
    name: str
    num_inputs: int = 0
    init: Literal["fan_in", "residual", "embedding", "ones", "zeros"] = "fan_in"
    is_flat: bool = False
    int8: bool = True

    @property
    def num_stack_axes(self) -> int:
        """Number of axes that stack matrices, before the inputs: 1 with experts, else 0."""
        return int(self.axes[0] == "experts")

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the shape of the weight in one layer."""
        return tuple(config.size(axis) for axis in self.axes)

    def fan_in(self, config: ModelConfig) -> int:
        """Returns the number of inputs of a linear layer."""
        start = self.num_stack_axes
        return math.prod(self.shape(config)[start : start + self.num_inputs])

    def weights_per_token(self, config: ModelConfig) -> int:
        """Returns how many of these weights multiply a token: those of its experts only."""
        size = math.prod(self.shape(config))
        if "experts" in self.axes:
            return size * config.num_experts_per_tok // config.num_local_experts
        return size

    def initialize(self, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
        """Returns a new parameter in `config.param_dtype`."""
        shape, dtype = self.shape(config), config.param_dtype
        if self.init == "ones":
            value = jnp.ones(shape, dtype)
        elif self.init == "zeros":
            value = jnp.zeros(shape, dtype)
        else:
            value = self._standard_deviation(config) * jax.random.normal(
                rngs.params(), shape, dtype
            )
        return nnx.Param(value, out_sharding=self.axes, eager_sharding=False)

    def _standard_deviation(self, config: ModelConfig) -> float:
        if self.init == "embedding":
            return config.initializer_range
        scale = self.fan_in(config) ** -0.5
        if self.init == "residual":
            # The 2L branches that are added to a token's embedding start no larger than it (GPT-2).
            # An untrained text is then nearly the bag of its tokens, which is easy to learn from.
            scale *= (2 * config.num_hidden_layers) ** -0.5
        return scale


WeightTable = dict[str, WeightSpec]


def base_weights(config: ModelConfig) -> WeightTable:
    """Returns the weights that Llama, Mistral and their successors share: all but feed-forward."""
    layer = "model.layers.{layer}"
    attention = f"{layer}.self_attn"
    table = {
        "embedding": WeightSpec(
            axes=("vocab", "embed"), name="model.embed_tokens.weight", init="embedding"
        ),
        "norm.scale": WeightSpec(axes=("norm",), name="model.norm.weight", init="ones"),
        "layers.attention_norm.scale": WeightSpec(
            axes=("norm",), name=f"{layer}.input_layernorm.weight", init="ones"
        ),
        "layers.feed_forward_norm.scale": WeightSpec(
            axes=("norm",), name=f"{layer}.post_attention_layernorm.weight", init="ones"
        ),
        "layers.attention.query": WeightSpec(
            axes=("embed", "heads", "head_dim"), name=f"{attention}.q_proj.weight", num_inputs=1
        ),
        "layers.attention.key": WeightSpec(
            axes=("embed", "kv_heads", "head_dim"), name=f"{attention}.k_proj.weight", num_inputs=1
        ),
        "layers.attention.value": WeightSpec(
            axes=("embed", "kv_heads", "head_dim"), name=f"{attention}.v_proj.weight", num_inputs=1
        ),
        "layers.attention.output": WeightSpec(
            axes=("heads", "head_dim", "embed"),
            name=f"{attention}.o_proj.weight",
            num_inputs=2,
            init="residual",
        ),
    }
    if config.has_lm_head and not config.tie_word_embeddings:
        table["head"] = WeightSpec(axes=("embed", "vocab"), name="lm_head.weight", num_inputs=1)
    return table | _projection_weights(config)


def _projection_weights(config: ModelConfig) -> WeightTable:
    """Returns the weights of the linear layers that follow pooling, if there are any."""
    layers = {"": ("embed", "embedding")}
    if config.embedding_projection_hidden_size is not None:
        layers = {"hidden_": ("embed", "embedding_hidden"), "": ("embedding_hidden", "embedding")}
    table = {}
    for folder, (name, axes) in zip(DENSE, layers.items(), strict=False):
        path = f"embedding_projection.{name}"
        table[f"{path}weight"] = WeightSpec(axes=axes, name=f"{folder}/linear.weight", num_inputs=1)
        if config.embedding_projection_bias:
            table[f"{path}bias"] = WeightSpec(
                axes=axes[1:], name=f"{folder}/linear.bias", init="zeros"
            )
    return table if config.embedding_projection_size is not None else {}


def head_biases() -> WeightTable:
    """Returns the biases of queries, keys and values, as Qwen2 names them."""
    return {
        f"layers.attention.{name}_bias": WeightSpec(
            axes=(axis, "head_dim"),
            name=f"model.layers.{{layer}}.self_attn.{name[0]}_proj.bias",
            init="zeros",
            is_flat=True,
        )
        for name, axis in (("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads"))
    }


def head_norms(init: Literal["ones", "zeros"] = "ones") -> WeightTable:
    """Returns the scales that normalize each head of queries and keys, as Qwen3 names them."""
    return {
        f"layers.attention.{name}_norm.scale": WeightSpec(
            axes=("head_dim",),
            name=f"model.layers.{{layer}}.self_attn.{name[0]}_norm.weight",
            init=init,
        )
        for name in ("query", "key")
    }


def mlp_weights() -> WeightTable:
    """Returns the weights of a dense gated feed-forward network, as Llama and Mistral name them."""
    mlp = "model.layers.{layer}.mlp"
    return {
        "layers.feed_forward.gate": WeightSpec(
            axes=("embed", "mlp"), name=f"{mlp}.gate_proj.weight", num_inputs=1
        ),
        "layers.feed_forward.up": WeightSpec(
            axes=("embed", "mlp"), name=f"{mlp}.up_proj.weight", num_inputs=1
        ),
        "layers.feed_forward.down": WeightSpec(
            axes=("mlp", "embed"), name=f"{mlp}.down_proj.weight", num_inputs=1, init="residual"
        ),
    }


def linear_layers(weights: WeightTable) -> WeightTable:
    """Returns the linear layers of a decoder layer, by names such as "attention.query"."""
    return {
        path.removeprefix(LAYERS): spec
        for path, spec in weights.items()
        if path.startswith(LAYERS) and spec.num_inputs
    }
