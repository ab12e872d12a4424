r"""Finetunes a small model on your own data, on one host.

The kinds of data, the mixtures and the row lengths are those of the prepared data:

    python train.py --config configs/finetune.py \
      --config.model.weights=MODEL --config.data.folder=DATA
"""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.mode = "auto"
    config.epochs = 1.0
    config.log_every_steps = 10
    config.model.weights = "MODEL"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_ratio = 0.1

    config.data.embedding = "auto"
    config.data.generative = "auto"
    config.data.embedding_batch_size = 32
    config.data.generative_batch_size = 8
    config.data.query_row_length = 0
    config.data.passage_row_length = 0
    config.data.chat_row_length = 0

    config.checkpoint.every_steps = 100
    return config
