"""GritLM 8x7B: trains Mixtral 8x7B on both losses, with the released hyperparameters."""

from grit_jax.config import default_config


def get_config():
    """Returns the configuration."""
    config = default_config()
    config.steps = 1253
    config.model.weights = "mistralai/Mixtral-8x7B-v0.1"
    config.model.architecture = "mixtral"

    # The original scaled the contrastive gradient by 1/256 on 256 GPUs (see gritlm_7b.py), and
    # summed the generative loss over tokens, with a small weight.
    config.loss.embedding_weight = 1 / 256
    config.loss.generative_weight = 0.003
    config.loss.temperature = 0.02
    config.loss.generative_reduction = "token"

    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_ratio = 0.03

    config.data.sources = "medi2=hf:GritLM/MEDI2 tulu2=hf:GritLM/tulu2"
    config.data.folder = "data/gritlm"
    config.data.embedding = "medi2"
    config.data.generative = "tulu2"
    config.data.embedding_batch_size = 256
    config.data.generative_batch_size = 256
    config.data.group_size = 2
    return config
