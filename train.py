"""Trains a model: python train.py --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"""

from grit_jax.cli import train

if __name__ == "__main__":
    train()
