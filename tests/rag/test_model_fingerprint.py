"""Which models an index recognizes: its own in any form, and no other finetune of the same base."""

import copy
import json

import jax
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.index_folder import DocumentIndexError
from grit_jax.rag.model_fingerprint import fingerprint, is_same_model
from grit_jax.sharding import make_mesh

DOCUMENTS = [{"text": "the sea is salt"}]
# Matrices that a finetune changes, by a part of their names.
FINETUNES = {"all": "proj", "the values": "v_proj", "the last layer": "layers.3"}
# In units of the weights' standard deviation: about what ten steps of AdamW with 2e-5 change in 7B.
CHANGE = 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in several formats, and finetunes of it."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    base = MistralForCausalLM(config)
    base.save_pretrained(root / "base")
    stored = HuggingFaceModel(root / "base")
    for dtype in ("float16", "bfloat16"):
        write_hugging_face(stored, root / dtype, dtype=dtype)
    write_orbax(stored, root / "orbax")
    for number, (name, part) in enumerate(FINETUNES.items()):
        finetune = copy.deepcopy(base)
        torch.manual_seed(number)
        for parameter_name, parameter in finetune.named_parameters():
            if part in parameter_name and parameter.ndim > 1:
                parameter.data += CHANGE * parameter.std() * torch.randn(parameter.shape)
        finetune.save_pretrained(root / name)
    return root


def opened(folder, num_devices=1, **options):
    mesh = make_mesh(devices=jax.devices()[:num_devices])
    return GritLM.from_pretrained(folder, mesh=mesh, tokenizer="mistral", **options)


INT8 = {"linear_dtype": "int8"}
FLOAT32, BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
SAME = [
    ("base", FLOAT32),
    ("float16", BFLOAT16),
    ("bfloat16", INT8),
    ("orbax", BFLOAT16 | {"num_devices": 2}),
]


@pytest.mark.slow
def test_a_model_is_recognized_in_every_form(folders):
    models = [opened(folders / name, **options) for name, options in SAME]
    stored = [json.loads(json.dumps(fingerprint(model))) for model in models]
    for model in models:
        assert all(is_same_model(each, model) for each in stored)


def test_a_finetune_of_the_same_base_is_refused(folders, tmp_path):
    index = tmp_path / "index"
    build_index(opened(folders / "base"), DOCUMENTS, index)
    finetune = None
    for name, options in zip(FINETUNES, (INT8, FLOAT32, BFLOAT16), strict=True):
        finetune = opened(folders / name, **options)
        with pytest.raises(DocumentIndexError, match="was built with another model"):
            DocumentIndex(index, finetune)
    with pytest.raises(DocumentIndexError, match="was built with another model"):
        build_index(finetune, DOCUMENTS, index)
    # Their embeddings do not tell, which is all that an index of an earlier version has.
    settings = json.loads((index / "index.json").read_text())
    del settings["weights"]
    (index / "index.json").write_text(json.dumps(settings))
    assert len(DocumentIndex(index, finetune)) == 1


def test_models_that_differ_only_in_their_heads_are_the_same(model):
    stored = fingerprint(model)
    other = copy.copy(model)
    other.model = copy.deepcopy(model.model)
    other.model.head[...] += 1
    assert is_same_model(stored, other)
    other.model.norm.scale[...] += 0.1
    assert np.allclose(other.encode([5, 6, 7]), model.encode([5, 6, 7]), atol=0.01)
    assert not is_same_model(stored, other)
