"""Qwen3 with a mixture of experts as feed-forward network (arXiv 2505.09388)."""

from grit_jax.models.architecture import (
    SUPPORTED_VALUES,
    TRANSFORMERS_DEFAULTS,
    Architecture,
    HuggingFaceFormat,
)
from grit_jax.models.config import ModelConfig
from grit_jax.models.experts import Experts, expert_weights
from grit_jax.models.weights import WeightTable, base_weights, head_norms

_DEFAULTS = {
    **TRANSFORMERS_DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
del _DEFAULTS["sliding_window"]  # See `supported_values`.


def qwen3_moe_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Qwen3 with experts."""
    experts = expert_weights(
        "model.layers.{layer}.mlp", gate="gate_proj", up="up_proj", down="down_proj"
    )
    return {**base_weights(config), **head_norms(), **experts}


# The sizes of Qwen3-30B-A3B.
QWEN3_MOE = Architecture(
    name="qwen3_moe",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    },
    weights=qwen3_moe_weights,
    feed_forward=Experts,
    formats=(
        HuggingFaceFormat(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            defaults=_DEFAULTS,
            other_names={
                "intermediate_size": ("moe_intermediate_size",),
                "num_local_experts": ("num_local_experts", "num_experts"),
            },
            # `intermediate_size` is the size of dense layers, of which there are none.
            ignored=frozenset({"intermediate_size", "max_window_layers", "sliding_window"}),
        ),
    ),
    supported_values={
        **SUPPORTED_VALUES,
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "use_sliding_window": (False, None),
    },
)
