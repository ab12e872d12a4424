"""Small models to embed and generate with."""

import functools
from pathlib import Path

import pytest
from small_model import one_device, small_model

from grit_jax import GritLM
from grit_jax.sharding import make_mesh

REFERENCE = Path(__file__).parents[1] / "reference"


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
    return small_model()
