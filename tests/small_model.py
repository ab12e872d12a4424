"""A small random model that embeds and generates."""

import jax

from grit_jax import GritLM
from grit_jax.models import ModelConfig, make_model
from grit_jax.sharding import make_mesh
from grit_jax.text.tokenizer import Tokenizer


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def small_model():
    """Returns a random model with Mistral's tokenizer on one device."""
    config = ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=700,
        initializer_range=0.2,
    )
    return GritLM(make_model(config, 0), one_device(), Tokenizer())
