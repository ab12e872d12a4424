"""Configuration fields of a run with a model so small that it takes seconds."""

SMALL = [
    "--config=configs/gritlm_tiny.py",
    "--config.model.sizes.hidden_size=32",
    "--config.model.sizes.intermediate_size=32",
    "--config.model.sizes.head_dim=8",
    "--config.data.embedding_batch_size=16",
    "--config.data.generative_batch_size=8",
    "--config.log_every_steps=1",
    "--config.optimizer.warmup_ratio=0.0",
]
