"""A small Mistral from scratch on the embedded sample: minutes on two cores."""

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
    # From random weights the next-token gradient is by far the larger of the two.
    config.loss.generative_weight = 0.1

    config.optimizer.learning_rate = 5e-4
    # The embeddings start at a standard deviation of 3, the layers' matrices at 1/16.
    config.optimizer.embedding_lr_multiplier = 180.0
    config.optimizer.warmup_ratio = 0.1
    # A rare word's first gradients would move it far if they counted as a thousandth of its past.
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
