"""The paper's embedding-only model: trains Mistral 7B on the contrastive loss."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.mode = "embedding"
    config.steps = 1253
    config.model.weights = "mistralai/Mistral-7B-v0.1"
    config.loss.embedding_weight = 1.0
    config.loss.temperature = 0.02
    config.optimizer.learning_rate = 2e-5
    config.data.sources = "medi2=hf:GritLM/MEDI2"
    config.data.folder = "data/gritlm"
    config.data.embedding = "medi2"
    config.data.embedding_batch_size = 2048
    config.data.group_size = 2
    return config
