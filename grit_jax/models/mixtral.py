"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts as feed-forward network."""

from grit_jax.models.architecture import TRANSFORMERS_DEFAULTS, Architecture, HuggingFaceFormat
from grit_jax.models.config import ModelConfig
from grit_jax.models.experts import Experts, expert_weights
from grit_jax.models.weights import WeightTable, base_weights


def mixtral_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Mixtral."""
    block = "model.layers.{layer}.block_sparse_moe"
    return {**base_weights(config), **expert_weights(block, gate="w1", up="w3", down="w2")}


MIXTRAL = Architecture(
    name="mixtral",
    defaults={
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
    },
    weights=mixtral_weights,
    feed_forward=Experts,
    formats=(
        HuggingFaceFormat(
            model_type="mixtral",
            class_name="MixtralForCausalLM",
            defaults={
                **TRANSFORMERS_DEFAULTS,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-5,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "router_aux_loss_coef": 0.001,
            },
        ),
    ),
)
