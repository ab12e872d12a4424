"""Mistral (arXiv 2310.06825) and Ministral, and Llama 2 and 3, whose computation is the same."""

from grit_jax.models.architecture import TRANSFORMERS_DEFAULTS, Architecture, HuggingFaceFormat
from grit_jax.models.config import ModelConfig
from grit_jax.models.layers import MLP
from grit_jax.models.weights import WeightTable, base_weights, mlp_weights

_LLAMA_DEFAULTS = {
    **TRANSFORMERS_DEFAULTS,
    "intermediate_size": 11008,
    "num_key_value_heads": None,  # As many as query heads.
    "max_position_embeddings": 2048,
}
del _LLAMA_DEFAULTS["sliding_window"]  # A Llama has none, whatever its config.json says.


def mistral_weights(config: ModelConfig) -> WeightTable:
    """Returns the table of weights of a Mistral or a Llama."""
    return {**base_weights(config), **mlp_weights()}


MISTRAL = Architecture(
    name="mistral",
    defaults={"layer_types": None},
    weights=mistral_weights,
    feed_forward=MLP,
    formats=(
        HuggingFaceFormat(
            model_type="mistral",
            class_name="MistralForCausalLM",
            defaults={**TRANSFORMERS_DEFAULTS, "sliding_window": 4096},
            # AutoModel reads such a Mistral as a Ministral.
            reads_layer_types=True,
        ),
        HuggingFaceFormat(
            model_type="ministral",
            class_name="MinistralForCausalLM",
            defaults={**TRANSFORMERS_DEFAULTS, "sliding_window": 4096},
            reads_layer_types=True,
        ),
        HuggingFaceFormat(
            model_type="llama", class_name="LlamaForCausalLM", defaults=_LLAMA_DEFAULTS
        ),
    ),
)
