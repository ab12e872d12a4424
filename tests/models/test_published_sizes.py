"""Published configurations: all their fields are read, and the weights are as many as published."""

import math

import pytest

from grit_jax.conversion.layout import parameters
from grit_jax.models import ARCHITECTURES, config_from_hugging_face, unread_fields

MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": 32768,
}
NEMO = {**MISTRAL, "head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40}
NEMO |= {"vocab_size": 131072, "max_position_embeddings": 1024000}
LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TIED = {"tie_word_embeddings": True}
# The content of config.json, and the number of weights.
PUBLISHED = {
    "Mistral-7B-v0.1": (
        MISTRAL | {"vocab_size": 32000, "sliding_window": 4096, "rope_theta": 10000.0},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (MISTRAL, 7_248_023_552),
    "Mistral-Nemo-Base-2407": (NEMO, 12_247_782_400),
    "Mistral-Small-24B-Base-2501": (NEMO | {"intermediate_size": 32768}, 23_572_403_200),
    "Ministral-8B-Instruct-2410": (
        NEMO
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"sliding_window": 32768},
        8_019_808_256,
    ),
    "Llama-3.1-8B": (LLAMA, 8_030_261_248),
    "Qwen3-0.6B": (
        QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "max_window_layers": 28, **TIED},
        596_049_920,
    ),
    "Qwen3-4B": (
        QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, **TIED},
        4_022_468_096,
    ),
    "Qwen3-8B": (QWEN3, 8_190_735_360),
    "Qwen3-30B-A3B": (
        QWEN3
        | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144}
        | {"num_hidden_layers": 48, "num_key_value_heads": 4, "max_window_layers": 48}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768}
        | {"norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8}
        | {"router_aux_loss_coef": 0.001},
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_weights(name):
    fields, published = PUBLISHED[name]
    assert unread_fields(fields) == {}
    config = config_from_hugging_face(fields)
    assert sum(math.prod(spec.full_shape) for spec in parameters(config)) == published


def test_operations_follow_from_the_weights_that_a_token_passes_through():
    fields, _ = PUBLISHED["Qwen3-30B-A3B"]
    config = config_from_hugging_face(fields)
    per_token = ARCHITECTURES[config.architecture].matmul_flops_per_token(config)
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    assert per_token == 2 * 48 * (attention + 2048 * 128 + 8 * 3 * 2048 * 768)
