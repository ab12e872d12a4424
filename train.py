"""Trains a model: python train.py --config configs/gritlm_7b.py [--workdir DIR] [--config.x.y=z]."""

from grit_jax.cli import train

if __name__ == "__main__":
    train()
