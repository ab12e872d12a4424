"""Gemma 3 (arXiv 2503.19786), text only.

Of six layers, five attend to a sliding window, with rotary frequencies of their own. Attention and
the feed-forward network have a norm before and after them, and norms are stored minus 1. Token
embeddings are multiplied by the square root of their size.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from grit_jax.models.architecture import (
    TRANSFORMERS_DEFAULTS,
    Architecture,
    HuggingFaceFormat,
    read_rotary,
)
from grit_jax.models.config import FULL, SLIDING, ModelConfig
from grit_jax.models.layers import GegluMLP
from grit_jax.models.weights import WeightSpec, WeightTable, base_weights, head_norms, mlp_weights

# One layer in this many attends to whole texts.
_PERIOD = 6


def gemma3_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Gemma 3."""
    table = {**base_weights(config), **head_norms(), **mlp_weights()}
    layer = "model.layers.{layer}"
    names = {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    }
    for ours, theirs in names.items():
        table[f"layers.{ours}.scale"] = WeightSpec(axes=("norm",), name=f"{layer}.{theirs}.weight")
    return {
        path: dataclasses.replace(spec, init="zeros") if path.endswith("norm.scale") else spec
        for path, spec in table.items()
    }


# Fields of a model for images and text that do not say anything of its text model.
_IMAGE_FIELDS = frozenset(
    """
    architectures boi_token_index eoi_token_index image_token_index mm_tokens_per_image text_config
    vision_config
    """.split()  # noqa: SIM905  It reads better.
)


class Gemma3(Architecture):
    """The architecture, whose config.json has fields of its own for layers and rotary bases."""

    def causal_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of a config.json, as it is for causal attention.

        With `use_bidirectional_attention`, `sliding_window` is the sum of how far a token attends
        in both directions.
        """
        if fields["model_type"] == "gemma3":  # A model for images and text.
            outer = {name: value for name, value in fields.items() if name not in _IMAGE_FIELDS}
            fields = {**outer, **fields["text_config"], "model_type": "gemma3_text"}
        defaults = self.formats[0].defaults
        # Published files leave it out, and they are read elsewhere, too.
        fields = {"tie_word_embeddings": defaults["tie_word_embeddings"], **fields}
        if fields.pop("use_bidirectional_attention", False):
            window = fields.get("sliding_window", defaults["sliding_window"])
            fields["sliding_window"] = window and window // 2
        return fields

    def bidirectional_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of a config.json, as it is for bidirectional attention."""
        window = fields.get("sliding_window", self.formats[0].defaults["sliding_window"])
        return {
            **fields,
            "use_bidirectional_attention": True,
            "sliding_window": window and 2 * window,
        }

    def config_from_hugging_face(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Returns the configuration that the content of a config.json describes."""
        return super().config_from_hugging_face(self.causal_fields(fields))

    def embedding_scale(self, config: ModelConfig) -> float:
        """Returns what token embeddings are multiplied by."""
        return config.hidden_size**0.5

    def layer_types(self, fields: Mapping[str, Any]) -> Sequence[str]:
        """Returns the type of each layer, by `sliding_window_pattern`."""
        period = fields["sliding_window_pattern"]
        layers = range(1, fields["num_hidden_layers"] + 1)
        return [SLIDING if layer % period else FULL for layer in layers]

    def rotary(self, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of `ModelConfig` for the rotary embeddings of both types of layers."""
        by_type = {SLIDING: {}, FULL: {}, **(fields.get("rope_parameters") or {})}
        if unknown := sorted(by_type.keys() - {SLIDING, FULL}):
            raise ValueError(
                f"config.json: rope_parameters has {', '.join(unknown)}, but must have "
                f"{SLIDING!r} and {FULL!r}"
            )
        full = {**(by_type[FULL] or {}), **(fields.get("rope_scaling") or {})}
        theta, scaling = read_rotary(f"rope_parameters.{FULL}", full, fields, sizes)
        local = {"rope_theta": sizes["rope_local_base_freq"], **(by_type[SLIDING] or {})}
        local_theta, local_scaling = read_rotary(f"rope_parameters.{SLIDING}", local, {}, sizes)
        if local_scaling is not None:
            raise ValueError(
                f"config.json: rope_parameters.{SLIDING} of type {local_scaling.rope_type!r} is "
                "not supported, only 'default'"
            )
        has_window = sizes["sliding_window"] is not None
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_local_base_freq": local_theta if has_window else None,
        }

    def config_to_hugging_face(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the content of a config.json that old and new versions of transformers read."""
        fields = super().config_to_hugging_face(config)
        del fields["hidden_act"]
        is_sliding = config.sliding_layers() & (config.sliding_window is not None)
        local, scaling = config.rope_local_base_freq or config.rope_theta, config.rope_scaling
        scalar = config.query_pre_attn_scalar or config.head_dim
        return {
            **fields,
            "hidden_activation": "gelu_pytorch_tanh",
            # Transformers reads 256, but not 256.0.
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "layer_types": [SLIDING if sliding else FULL for sliding in is_sliding],
            "rope_parameters": {
                FULL: fields["rope_parameters"],
                SLIDING: {"rope_type": "default", "rope_theta": local},
            },
            "rope_scaling": scaling and scaling.to_fields(),  # The name in transformers 4.
        }


_FORMAT: dict[str, Any] = {
    "class_name": "Gemma3ForCausalLM",
    "headless_class_name": "Gemma3TextModel",
    "defaults": {
        **TRANSFORMERS_DEFAULTS,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rope_theta": 1e6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
    },
    "reads_layer_types": True,
    "other_defaults": {
        "sliding_window_pattern": _PERIOD,
        "use_bidirectional_attention": False,
    },
}

# The sizes of Gemma 3 1B.
GEMMA3 = Gemma3(
    name="gemma3",
    defaults={
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "layer_types": (SLIDING,) * (_PERIOD - 1) + (FULL,),
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256.0,
        "final_logit_softcapping": None,
    },
    weights=gemma3_weights,
    feed_forward=GegluMLP,
    formats=(
        HuggingFaceFormat(model_type="gemma3_text", **_FORMAT),
        HuggingFaceFormat(model_type="gemma3", **_FORMAT),
    ),
    supported_values={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False, None),
    },
)
