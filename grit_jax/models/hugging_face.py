"""Configurations as Hugging Face's `config.json` holds them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from grit_jax.models.decoder import ModelConfig
from grit_jax.models.mixtral import MixtralConfig

# What transformers takes for a field that config.json leaves out: it writes only what differs.
_COMMON = {
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
    # Not one of transformers': the layer that makes embeddings lies in a file of its own.
    "embedding_projection_size": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _COMMON | {"sliding_window": 4096},
    "mixtral": _COMMON
    | {
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    # A Llama is a Mistral without a window.
    "llama": _COMMON
    | {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
}

# Fields that would change the mathematics, and the only values that these models know.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "router_jitter_noise": 0.0,
    "quantization_config": None,
}


def config_from_hugging_face(fields: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """Returns the configuration of a Mistral, a Mixtral or a Llama (as a Mistral).

    Args:
      fields: the content of `config.json`, with the older `rope_theta` or the newer
        `rope_parameters`; what is left out has the default of transformers.
      **overrides: fields of the configuration that are not the checkpoint's, such as `dtype`.

    Raises:
      ValueError: the architecture is another, or a field asks for what these models do not do;
        the message names the field.
    """
    model_type = fields.get("model_type")
    if model_type not in DEFAULTS:
        raise ValueError(
            f"config.json: model_type={model_type!r} must be one of {', '.join(DEFAULTS)}"
        )
    for name, known in REQUIRED.items():
        if fields.get(name, known) != known:
            raise ValueError(
                f"config.json: {name}={fields[name]!r} is not supported, only {known!r} is"
            )
    known = DEFAULTS[model_type]
    sizes = {name: fields.get(name, default) for name, default in known.items()}
    if model_type == "llama":
        sizes["sliding_window"] = None
    sizes["rope_theta"] = _rope_theta(fields, sizes["rope_theta"])
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    sizes["head_dim"] = (
        fields.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    )
    config_class = MixtralConfig if model_type == "mixtral" else ModelConfig
    return config_class(**sizes | overrides)


def config_to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that transformers, old and new, reads as `config`."""
    is_mixtral = isinstance(config, MixtralConfig)
    architecture = "Mixtral" if is_mixtral else "Mistral"
    shared = DEFAULTS[architecture.lower()].keys() | {"head_dim"}
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in shared
    }
    if config.embedding_projection_size is None:
        del fields["embedding_projection_size"]
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _rope_theta(fields: Mapping[str, Any], default: float) -> float:
    """Returns the base of the rotary frequencies; scaled frequencies are refused."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"config.json: rotary embeddings of type {kind!r} are not supported, only 'default'"
        )
    return parameters.get("rope_theta") or fields.get("rope_theta") or default
