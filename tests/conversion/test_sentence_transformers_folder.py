"""Models that sentence-transformers saved embed as they do there."""

import json

import numpy as np
import pytest
from small_model import one_device
from tokenizer_files import BEGIN, END, write_tokenizer

from grit_jax import GritLM
from grit_jax.conversion import ConversionError, open_model
from grit_jax.conversion.stored_model import ConversionWarning

TEXTS = ["a", "Land beside water.", "\nfoo bar", "word " * 20]
PROMPTS = {"query": "Instruct: Find it\nQuery: ", "web_search": "unused"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Qwen3 with its tokenizer, which adds EOS."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3Model(Qwen3Config(**sizes, initializer_range=0.4)).save_pretrained(folder)
    write_tokenizer(folder, "gpt2", 320, begin=(), end=(END,))
    settings = {"bos_token": None, "eos_token": END, "pad_token": BEGIN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save(base, folder, pooling="lasttoken", prompts=None, others=(), **options):
    """Returns the model that sentence-transformers saves in a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as models

    transformer = models.Transformer(str(base))
    modules = [transformer, models.Pooling(16, pooling, **options), *others, models.Normalize()]
    model = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    model.save(str(folder))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "prompts"), [("lasttoken", PROMPTS), ("mean", None), ("weightedmean", None)]
)
def test_a_model_embeds_as_in_sentence_transformers(base, tmp_path, pooling, prompts):
    theirs = save(base, tmp_path / "model", pooling, prompts)
    ours = GritLM.from_pretrained(tmp_path / "model", dtype="float32", mesh=one_device())
    for name in ("encode_query", "encode_document"):
        expected = getattr(theirs, name)(TEXTS)
        np.testing.assert_allclose(getattr(ours, name)(TEXTS), expected, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling 'max' is not supported"),
        ({"pooling": ("cls", "mean")}, r"pooling \['cls', 'mean'\] is not supported"),
        ({"pooling": "mean", "prompts": PROMPTS}, "pools its prompts, too: pass embed_instruction"),
    ],
)
def test_what_differs_is_said(base, tmp_path, options, message):
    save(base, tmp_path / "model", **options)
    with pytest.warns(ConversionWarning, match=message):
        open_model(tmp_path / "model")


@pytest.mark.slow
def test_other_modules_and_damaged_files_are_said(base, tmp_path):
    from sentence_transformers.sentence_transformer import modules as models

    save(base, tmp_path / "model", others=[models.LayerNorm(16)])
    with pytest.warns(ConversionWarning, match=r"computed without LayerNorm \(2_LayerNorm\)"):
        open_model(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text('{"idx": 0}')
    with pytest.raises(ConversionError, match=r"modules\.json is not a list of modules"):
        open_model(tmp_path / "model")
