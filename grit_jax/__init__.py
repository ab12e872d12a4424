"""grit-jax: one decoder language model that embeds and generates, trained with JAX."""

__version__ = "0.1.0"
