"""Small models saved by transformers."""

import os
import tempfile

# Tests do not access the Hugging Face Hub, and write nothing to the home folder.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf_home"))

import pytest
from tokenizer_files import write_llama_tokenizer, write_tokenizer

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Folders of a Mistral, a Mixtral in bfloat16 and in several files, and a tied Llama.

    The folder of the Llama also has a tokenizer like that of Llama 3.
    """
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("saved")
    mistral = MistralForCausalLM(MistralConfig(**SIZES, head_dim=16, sliding_window=64))
    mistral.save_pretrained(root / "mistral")
    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    mixtral.to(torch.bfloat16).save_pretrained(root / "mixtral", max_shard_size="1MB")
    llama = LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )
    )
    llama.save_pretrained(root / "llama")
    write_tokenizer(root / "llama", "llama3")
    return {name: root / name for name in ("mistral", "mixtral", "llama")}


@pytest.fixture(scope="session")
def exported_both(tmp_path_factory):
    """The folders "generation" and "embedding" of a small Llama, and GritLM with the same model."""
    from small_model import one_device
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grit_jax import GritLM
    from grit_jax.conversion import open_model
    from grit_jax.conversion.export import write_hugging_face

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("both")
    config = LlamaConfig(**SIZES | {"vocab_size": 700, "num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(root / "source")
    write_llama_tokenizer(root / "source", 700)
    instructions = {"query_instruction": "Find it", "document_instruction": ""}
    write_hugging_face(
        open_model(root / "source"), root / "exported", purpose="both", **instructions
    )
    model = GritLM.from_pretrained(
        root / "source", dtype="float32", mesh=one_device(), **instructions
    )
    return root / "exported", model
