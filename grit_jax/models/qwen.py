"""Qwen2 and Qwen2.5 (arXiv 2412.15115), and Qwen3 (arXiv 2505.09388), with a dense network.

Qwen2 is a Llama with biases of queries, keys and values. Qwen3 normalizes each head of queries and
keys instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from grit_jax.models.architecture import TRANSFORMERS_DEFAULTS, Architecture, HuggingFaceFormat
from grit_jax.models.config import FULL, SLIDING, ModelConfig
from grit_jax.models.layers import MLP
from grit_jax.models.weights import WeightTable, base_weights, head_biases, head_norms, mlp_weights

_QWEN_DEFAULTS = {
    **TRANSFORMERS_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_WINDOW_DEFAULTS = {"use_sliding_window": False, "max_window_layers": 28}


class Qwen(Architecture):
    """An architecture whose config.json says from which layer on there is a sliding window."""

    def layer_types(self, fields: Mapping[str, Any]) -> Sequence[str]:
        """Returns the type of each layer, by `use_sliding_window` and `max_window_layers`."""
        num_layers = fields["num_hidden_layers"]
        num_full = min(fields["max_window_layers"], num_layers)
        if not fields["use_sliding_window"] or fields["sliding_window"] is None:
            num_full = num_layers
        return [FULL] * num_full + [SLIDING] * (num_layers - num_full)

    def config_to_hugging_face(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the content of a config.json that old and new versions of transformers read."""
        is_sliding = config.sliding_layers() & (config.sliding_window is not None)
        num_full = int(is_sliding.argmax()) if is_sliding.any() else config.num_hidden_layers
        return {
            **super().config_to_hugging_face(config),
            "use_sliding_window": bool(is_sliding.any()),
            "max_window_layers": num_full,
        }


def qwen2_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Qwen2."""
    return {**base_weights(config), **head_biases(), **mlp_weights()}


def qwen3_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Qwen3."""
    return {**base_weights(config), **head_norms(), **mlp_weights()}


# The sizes of Qwen2.5-7B and Qwen3-8B.
QWEN2 = Qwen(
    name="qwen2",
    defaults={
        "layer_types": None,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    },
    weights=qwen2_weights,
    feed_forward=MLP,
    formats=(
        HuggingFaceFormat(
            model_type="qwen2",
            class_name="Qwen2ForCausalLM",
            defaults=_QWEN_DEFAULTS,
            reads_layer_types=True,
            other_defaults=_WINDOW_DEFAULTS,
        ),
    ),
)
QWEN3 = Qwen(
    name="qwen3",
    defaults={
        "layer_types": None,
        "vocab_size": 151936,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    },
    weights=qwen3_weights,
    feed_forward=MLP,
    formats=(
        HuggingFaceFormat(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
            reads_layer_types=True,
            other_defaults=_WINDOW_DEFAULTS,
        ),
    ),
)
