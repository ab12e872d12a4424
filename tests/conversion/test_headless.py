"""Models with a language model head of their own, a copy of the embeddings, or none."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizer_files import write_tokenizer

from grit_jax import GritLM
from grit_jax.config import ConfigError, default_config, parse_config
from grit_jax.conversion import ConversionError, HuggingFaceModel, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.from_config import make_trainer, open_pretrained
from grit_jax.models import HeadError
from grit_jax.sharding import make_mesh

HEAD, EMBEDDINGS, WEIGHTS = "lm_head.weight", "model.embed_tokens.weight", "model.safetensors"
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TOKENS = np.random.default_rng(0).integers(3, 320, (1, 12))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A Llama whose embeddings are its head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tied")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    write_tokenizer(folder, "gpt2", size=320)
    return folder


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A Mistral saved as an embedding model, and the model with its head."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("headless")
    model = MistralForCausalLM(MistralConfig(**SIZES))
    model.save_pretrained(root / "whole")
    model.model.save_pretrained(root / "headless")
    for name in ("whole", "headless"):
        write_tokenizer(root / name, "gpt2", size=320)
    return root / "headless", root / "whole"


def load(path, **options):
    mesh = make_mesh(devices=jax.devices()[:1])
    return GritLM.from_pretrained(path, dtype="float32", mesh=mesh, **options)


def their_logits(folder):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("head", ["another", "a copy", "a copy in float16", "the only one"])
def test_a_head_beside_tied_embeddings(tied, tmp_path, head):
    folder = tmp_path / "model"
    shutil.copytree(tied, folder)
    tensors = load_file(folder / WEIGHTS)
    # float16 holds these numbers exactly.
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS].astype(np.float16).astype(np.float32)
    tensors[HEAD] = tensors[EMBEDDINGS].copy()
    if head == "another":
        tensors[HEAD][-1, -1] += 1
    elif head == "a copy in float16":
        tensors[HEAD] = tensors[HEAD].astype(np.float16)
    elif head == "the only one":
        del tensors[EMBEDDINGS]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if head == "another":
        with pytest.warns(ConversionWarning, match=r"tie_word_embeddings=true, but lm_head.weight"):
            model = open_model(folder)
    else:
        model = open_model(folder)
    assert model.config.tie_word_embeddings == (head != "another")

    write_orbax(model, tmp_path / "orbax")
    write_hugging_face(model, tmp_path / "exported")
    expected = their_logits(folder)
    np.testing.assert_array_equal(their_logits(tmp_path / "exported"), expected)
    module = load(tmp_path / "orbax").model
    ours = module.logits(module(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    exported = load_file(tmp_path / "exported" / WEIGHTS)
    assert (HEAD in exported) == (head == "another")


def test_a_model_without_a_head_embeds(headless, tmp_path):
    import torch
    from transformers import AutoModel

    folder, whole = headless
    write_orbax(open_model(folder), tmp_path / "orbax")
    write_hugging_face(open_model(tmp_path / "orbax"), tmp_path / "exported")
    fields = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert fields["architectures"] == ["MistralModel"]
    assert HEAD not in load_file(tmp_path / "exported" / WEIGHTS)
    theirs = AutoModel.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).last_hidden_state.mean(1).numpy()
    expected /= np.linalg.norm(expected)
    for source in (folder, tmp_path / "orbax", tmp_path / "exported", whole):
        model = load(source, attention="cccc")
        np.testing.assert_allclose(model.encode(list(TOKENS)), expected, atol=1e-5)
    small = load(folder, attention="cccc", linear_dtype="int8").encode(list(TOKENS))
    assert (small @ expected.T).item() > 0.99


def test_a_model_without_a_head_does_not_generate(headless, tmp_path):
    folder, whole = headless
    model = load(folder)
    message = "no language model head .lm_head.weight.*--head"
    for call in (
        lambda: model.generate("Hi"),
        lambda: next(iter(model.stream("Hi"))),
        lambda: model.score(["Hi"], [" you"]),
        lambda: model.model.logits(jnp.zeros((1, 1, 32))),
    ):
        with pytest.raises(HeadError, match=message):
            call()
    assert open_model(folder, head=whole).config.has_lm_head
    assert open_model(folder, head="tied").config.tie_word_embeddings
    with pytest.raises(ConversionError, match="leave out --head"):
        open_model(whole, head="tied")
    # A folder that is said to have a head has lost it.
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copy(whole / "config.json", copy)
    with pytest.warns(ConversionWarning, match="names a MistralForCausalLM: the model embeds"):
        HuggingFaceModel(copy)


def test_a_model_without_a_head_is_trained_to_embed(headless):
    config = default_config()
    config.model.weights = str(headless[0])
    with pytest.raises(ConfigError, match=r"config.mode='unified' needs a language model head"):
        make_trainer(parse_config(config), open_pretrained(parse_config(config)))
    config.mode = "embedding"
    parsed = parse_config(config)
    trainer = make_trainer(parsed, open_pretrained(parsed), jax.devices()[:1])
    assert "head" not in trainer.abstract_state().parameters
