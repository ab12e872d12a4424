"""Ministral 3: a Mistral that scales queries by their position (arXiv 2601.08584)."""

from grit_jax.models.architecture import TRANSFORMERS_DEFAULTS, Architecture, HuggingFaceFormat
from grit_jax.models.layers import MLP
from grit_jax.models.mistral import mistral_weights
from grit_jax.models.rotary import RopeScaling

_ROPE_PARAMETERS = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# The sizes of Ministral 3 8B.
MINISTRAL3 = Architecture(
    name="ministral3",
    defaults={
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "max_position_embeddings": 262144,
        "rope_theta": 1e6,
        "rope_scaling": RopeScaling.from_fields(_ROPE_PARAMETERS),
    },
    weights=mistral_weights,
    feed_forward=MLP,
    scales_queries=True,
    formats=(
        HuggingFaceFormat(
            model_type="ministral3",
            class_name="Ministral3ForCausalLM",
            defaults={
                **TRANSFORMERS_DEFAULTS,
                "vocab_size": 131072,
                "num_hidden_layers": 34,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-5,
            },
            other_defaults={"rope_parameters": {**_ROPE_PARAMETERS, "rope_theta": 1e6}},
        ),
    ),
)
