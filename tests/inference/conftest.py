"""Small models to embed and generate with."""

import functools
from pathlib import Path

import jax
import pytest

from grit_jax import GritLM
from grit_jax.data.tokenizer import Tokenizer
from grit_jax.models import MistralConfig, make_model
from grit_jax.sharding import make_mesh

REFERENCE = Path(__file__).parents[1] / "reference"


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def reference_model():
    """Makes the original's tiny model, which reads token ids; options go to `GritLM`.

    What has been made, and compiled, is returned again.
    """

    @functools.cache
    def make(architecture="mistral", on_eight_devices=False, **options):
        mesh = make_mesh(fsdp=4, tensor=2) if on_eight_devices else one_device()
        folder = REFERENCE / f"tiny-{architecture}"
        return GritLM.from_pretrained(folder, dtype="float32", mesh=mesh, **options)

    return make


@pytest.fixture(scope="session")
def model():
    """A small random model that reads strings, as Mistral's tokenizer does."""
    config = MistralConfig(
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
