"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts as feed-forward network."""

from grit_jax.models.architecture import TRANSFORMERS_DEFAULTS, Architecture, HuggingFaceFormat
from grit_jax.models.config import ModelConfig
from grit_jax.models.experts import EXPERT_DOWN_AXES, EXPERT_UP_AXES, Experts
from grit_jax.models.weights import WeightSpec, WeightTable, base_weights


def mixtral_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Mixtral."""
    experts = "model.layers.{layer}.block_sparse_moe"
    return {
        **base_weights(config),
        # Small, and a rounding error would send tokens to other experts.
        "layers.feed_forward.router": WeightSpec(
            axes=("embed", "router"), name=f"{experts}.gate.weight", num_inputs=1, int8=False
        ),
        "layers.feed_forward.gate": WeightSpec(
            axes=EXPERT_UP_AXES, name=f"{experts}.experts.{{expert}}.w1.weight", num_inputs=1
        ),
        "layers.feed_forward.up": WeightSpec(
            axes=EXPERT_UP_AXES, name=f"{experts}.experts.{{expert}}.w3.weight", num_inputs=1
        ),
        "layers.feed_forward.down": WeightSpec(
            axes=EXPERT_DOWN_AXES,
            name=f"{experts}.experts.{{expert}}.w2.weight",
            num_inputs=1,
            init="residual",
        ),
    }


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
