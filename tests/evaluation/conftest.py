"""A small exported model with a tokenizer."""

import os
import tempfile

# Tests do not access the Hugging Face Hub, and write nothing to the home folder.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf_home"))
os.environ.setdefault("MTEB_CACHE", tempfile.mkdtemp(prefix="mteb"))

import pytest

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.export import write_hugging_face


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of a Mistral with random weights."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("models")
    MistralForCausalLM(config).save_pretrained(folder / "random")
    write_hugging_face(HuggingFaceModel(folder / "random"), folder / "exported")
    return folder / "exported"


@pytest.fixture(scope="session")
def model(exported):
    """The exported model in float32."""
    return GritLM.from_pretrained(exported, dtype="float32")
