"""The paper's generation-only model: trains Mistral 7B on the next-token loss."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.mode = "generative"
    config.steps = 1253
    config.model.weights = "mistralai/Mistral-7B-v0.1"
    config.loss.generative_weight = 1.0
    config.loss.generative_reduction = "mixed"
    config.loss.generative_group_size = 32
    config.optimizer.learning_rate = 2e-5
    config.data.sources = "tulu2=hf:GritLM/tulu2"
    config.data.folder = "data/gritlm"
    config.data.generative = "tulu2"
    config.data.generative_batch_size = 256
    return config
