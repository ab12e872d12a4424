"""Trains Gemma 3 1B on both losses, on the public data of F2LLM and Tulu 3.

Accept the license of the weights on the Hugging Face Hub first.
"""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.steps = 12_000  # About one epoch of F2LLM.
    config.model.weights = "google/gemma-3-1b-pt"
    config.model.architecture = "gemma3"

    # Batch, learning rate and negatives are those of F2LLM.
    config.optimizer.learning_rate = 1e-5
    config.data.embedding_batch_size = 512
    config.data.generative_batch_size = 64
    config.data.group_size = 8

    config.data.sources = "f2llm=hf:codefuse-ai/F2LLM tulu3=hf:allenai/tulu-3-sft-mixture"
    config.data.folder = "data/gemma3_1b"
    config.data.embedding = "f2llm"
    config.data.generative = "tulu3"
    return config
