"""Trains Llama 3.1 8B on both losses, on the public data of F2LLM and Tulu 3.

Accept the license of the weights on the Hugging Face Hub first.
"""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.steps = 12_000  # About one epoch of F2LLM.
    config.model.weights = "meta-llama/Llama-3.1-8B"
    config.model.architecture = "mistral"
    # Those of the weights, for `grit-jax plan`, which does not download them.
    config.model.sizes = {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    }

    # Batch, learning rate and negatives are those of F2LLM.
    config.optimizer.learning_rate = 8e-6
    config.data.embedding_batch_size = 512
    config.data.generative_batch_size = 64
    config.data.group_size = 8

    config.data.sources = "f2llm=hf:codefuse-ai/F2LLM tulu3=hf:allenai/tulu-3-sft-mixture"
    config.data.folder = "data/llama3_8b"
    config.data.embedding = "f2llm"
    config.data.generative = "tulu3"
    return config
