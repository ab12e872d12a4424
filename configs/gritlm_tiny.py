"""Trains a small Mistral from scratch on the embedded sample, in minutes on two CPU cores."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.steps = 300
    config.log_every_steps = 10

    config.model.sizes = {
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 3.0,
    }
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.loss.temperature = 0.05
    # With random weights, the gradient of the next-token loss is much the larger one.
    config.loss.generative_weight = 0.1

    config.optimizer.learning_rate = 5e-4
    # The initial standard deviation is 3 for the embeddings and 1/16 for the layers.
    config.optimizer.embedding_lr_multiplier = 180.0
    config.optimizer.warmup_ratio = 0.1
    # With 0.999, the first gradients of a rare token would move its embedding too far.
    config.optimizer.beta2 = 0.95

    config.data.folder = "data/sample"
    config.data.embedding = "sample_embedding"
    config.data.generative = "sample_chat"
    config.data.embedding_batch_size = 128
    config.data.generative_batch_size = 8
    config.data.query_row_length = 512
    config.data.passage_row_length = 512
    config.data.chat_row_length = 512
    config.data.row_length_multiple = 8

    config.checkpoint.every_steps = 100
    config.evaluation.enabled = True
    return config
