"""Trains Qwen3 0.6B on both losses, on the public data of F2LLM and Tulu 3."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.steps = 12_000  # About one epoch of F2LLM.
    config.model.weights = "Qwen/Qwen3-0.6B-Base"
    config.model.architecture = "qwen3"
    # Those of the weights, for `grit-jax plan`, which does not download them.
    config.model.sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }

    # Batch, learning rate and negatives are those of F2LLM.
    config.optimizer.learning_rate = 1e-5
    config.data.embedding_batch_size = 512
    config.data.generative_batch_size = 64
    config.data.group_size = 8

    config.data.sources = "f2llm=hf:codefuse-ai/F2LLM tulu3=hf:allenai/tulu-3-sft-mixture"
    config.data.folder = "data/qwen3_0_6b"
    config.data.embedding = "f2llm"
    config.data.generative = "tulu3"
    return config
