"""The configuration shared by all runs of the experiment; `experiments.claim` overrides fields."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.log_every_steps = 10
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.loss.temperature = 0.02
    config.loss.generative_reduction = "mixed"

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_ratio = 0.1

    config.data.embedding = "claim_embedding"
    config.data.generative = "claim_chat"
    config.data.embedding_batch_size = 64
    config.data.generative_batch_size = 16
    config.data.query_row_length = 256
    config.data.passage_row_length = 256
    config.data.chat_row_length = 256
    config.data.row_length_multiple = 64

    config.checkpoint.every_steps = 100_000  # The last step is always saved.
    config.checkpoint.keep = 1
    return config
