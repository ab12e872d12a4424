"""The record of an architecture: its sizes, weights, feed-forward network and config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx

from grit_jax.models.config import COMMON_SIZES, FEATURES, ModelConfig
from grit_jax.models.weights import WeightTable, linear_layers

# What transformers assumes for a field that config.json leaves out.
TRANSFORMERS_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    # Not a field of transformers: a sentence-transformers folder stores this layer.
    "embedding_projection_size": None,
}

# Fields of config.json that would change the computation, and the only supported value of each.
SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "router_jitter_noise": 0.0,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceFormat:
    """A `model_type` of Hugging Face's config.json.

    Attributes:
      model_type: its name.
      class_name: the class of transformers, for the field `architectures`.
      defaults: the fields that `ModelConfig` takes from config.json, and the values that
        transformers assumes where the file leaves them out. Without "head_dim", a head has
        hidden_size / num_attention_heads dimensions.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything in which an architecture differs from the others.

    Attributes:
      name: value of `config.model.architecture`.
      defaults: sizes of the released model that differ from `COMMON_SIZES`, and the features of
        `ModelConfig` that the architecture has.
      weights: returns the table of weights of a configuration.
      feed_forward: module class of the feed-forward network.
      formats: the formats of config.json that it reads; it writes the first.
      supported_values: fields of config.json for which only one value is supported, and that value.
    """

    name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: Callable[[ModelConfig], WeightTable]
    feed_forward: type[nnx.Module]
    formats: tuple[HuggingFaceFormat, ...]
    supported_values: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: SUPPORTED_VALUES
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """All sizes of the architecture, with their defaults."""
        return {**COMMON_SIZES, **self.defaults}

    def matmul_flops_per_token(self, config: ModelConfig) -> float:
        """Returns the operations of the linear layers for one token, in a forward pass.

        The attention scores and the logits are not included.
        """
        layers = linear_layers(self.weights(config)).values()
        weights = sum(spec.weights_per_token(config) for spec in layers)
        return 2.0 * config.num_hidden_layers * weights

    def config_from_hugging_face(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Returns the configuration that the content of a config.json describes.

        Raises:
          ValueError: a field has a value that is not supported; the message names the field.
        """
        for name, supported in self.supported_values.items():
            if fields.get(name, supported) != supported:
                raise ValueError(
                    f"config.json: {name}={fields[name]!r} is not supported, only {supported!r} is"
                )
        (defaults,) = (f.defaults for f in self.formats if f.model_type == fields["model_type"])
        sizes = {name: fields.get(name, default) for name, default in defaults.items()}
        sizes["rope_theta"] = _rope_theta(fields, sizes["rope_theta"])
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        sizes["head_dim"] = (
            fields.get("head_dim")
            or sizes.get("head_dim")
            or sizes["hidden_size"] // sizes["num_attention_heads"]
        )
        features = {name: self.defaults[name] for name in FEATURES if name in self.defaults}
        return ModelConfig(architecture=self.name, **{**features, **sizes})

    def config_to_hugging_face(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the content of a config.json that old and new versions of transformers read."""
        written = self.formats[0]
        fields = {name: getattr(config, name) for name in (*written.defaults, "head_dim")}
        if config.embedding_projection_size is None:
            del fields["embedding_projection_size"]
        return {
            "architectures": [written.class_name],
            "model_type": written.model_type,
            **fields,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def _rope_theta(fields: Mapping[str, Any], default: float) -> float:
    """Returns the base of the rotary frequencies.

    Raises:
      ValueError: the frequencies are scaled.
    """
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json: rotary embeddings of type {kind!r} are not supported, only 'default'"
        )
    return parameters.get("rope_theta") or fields.get("rope_theta") or default
