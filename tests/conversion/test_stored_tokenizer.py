"""Tokenizers by name and of stored models: which is taken, and what it adds to texts."""

import json
import shutil
import warnings

import gguf
import pytest
import reference_values
from tokenizer_files import BEGIN, END, write_tokenizer
import tokenizers

from grit_jax.conversion import ConversionError, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_tokenizer import find_tokenizer, open_tokenizer
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import tokenizer_path


@pytest.fixture
def folder(tmp_path):
    """A tiny Mistral of 320 tokens with a tokenizer that adds nothing to a text."""
    copy = tmp_path / "model"
    shutil.copytree(reference_values.FOLDER / "tiny-mistral", copy)
    write_tokenizer(copy, "gpt2", size=320, begin=())
    return copy


def with_fields(folder, **fields):
    """Returns the model in a folder, with other fields of its config.json."""
    model = open_model(folder)
    model.fields = model.fields | fields
    model.config = type(model.config)(**{**vars(model.config), "vocab_size": 32_000})
    return model


def test_only_a_mistral_without_a_tokenizer_gets_mistrals_and_it_is_said(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="model has no tokenizer: the one of Mistral 7B is used"):
        found = find_tokenizer(with_fields(folder))
    assert found is not None and found.fingerprint == Tokenizer().fingerprint
    llama = with_fields(folder, model_type="llama")
    for other in (llama, open_model(folder)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert find_tokenizer(other) is None
        with pytest.raises(ConversionError, match=r"model has no tokenizer: name .* \(--tokenizer"):
            write_hugging_face(other, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_tokenizer_is_named_by_its_file_model_checkpoint_or_run(folder, tmp_path):
    expected = Tokenizer(folder / "tokenizer.json")
    write_orbax(open_model(folder), tmp_path / "checkpoints" / "3")
    places = (folder, folder / "tokenizer.json", tmp_path / "checkpoints" / "3", tmp_path)
    for place in places:
        found = open_tokenizer(place)
        assert (found.fingerprint, found.adds_bos) == (expected.fingerprint, False)
        assert find_tokenizer(open_model(folder), place).fingerprint == expected.fingerprint
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"model has no tokenizer\.json or tokenizer\.model"):
        open_tokenizer(folder)
    shutil.copy(tokenizer_path("mistral"), folder / "tokenizer.model")
    with pytest.raises(ConversionError, match=r"model has 32000 tokens, but .*model only 320"):
        find_tokenizer(open_model(folder))


def test_a_run_that_saved_no_settings_was_trained_with_bos(folder, tmp_path):
    own = Tokenizer(folder)
    before = {**own.files, "tokenizer_config.json": json.dumps(own.special_tokens).encode()}
    for files, adds_bos in ((own.files, False), (before, True)):
        model = open_model(folder)
        model.tokenizer_files = files
        checkpoint = tmp_path / str(adds_bos)
        write_orbax(model, checkpoint)
        assert not find_tokenizer(open_model(checkpoint)).adds_bos  # It was only converted.
        (checkpoint / "description").mkdir()
        found = find_tokenizer(open_model(checkpoint))
        assert found.begin_ids.tolist() == ([own.bos_id] if adds_bos else [])
        assert (found.fingerprint == own.fingerprint) != adds_bos
        assert Tokenizer.of_files(found.files).adds_bos == adds_bos


def test_added_tokens_beyond_the_models_table_are_an_error_only_where_they_occur(folder):
    content = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    content.add_special_tokens(["[PAD]"])
    content.add_tokens(["<tool>"])
    content.save(str(folder / "tokenizer.json"))
    tokenizer = find_tokenizer(open_model(folder))
    assert tokenizer is not None and (tokenizer.base_vocab_size, tokenizer.vocab_size) == (320, 322)
    encoder = PromptEncoder(tokenizer, 320)
    with pytest.warns(UserWarning, match=r"text 0 contains \[PAD\], which is read as ordinary"):
        assert encoder.encode("[PAD]", add_bos=True, name="text 0").tokens.max() < 320
    with pytest.raises(InputError, match=r"text 1 has the token '<tool>' with the id 321"):
        encoder.encode("a <tool>", add_bos=True, name="text 1")


@pytest.mark.parametrize(
    ("kind", "split", "flag", "adds_bos"),
    [
        ("gpt2", "gpt-2", None, False),
        ("gpt2", "llama-bpe", None, True),
        ("gpt2", "gpt-2", True, True),
        ("gpt2", "llama-bpe", False, False),
        ("llama", None, None, True),
        ("llama", None, False, False),
    ],
)
def test_a_gguf_says_what_it_adds_or_follows_llama_cpp(tmp_path, kind, split, flag, adds_bos):
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")  # Of a model that is not supported.
    writer.add_tokenizer_model(kind)
    writer.add_token_list(["<unk>", BEGIN, END, "a", "b", "ab"])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    if split is None:
        writer.add_token_scores([0.0, 0.0, 0.0, -2.0, -3.0, -1.0])
    else:
        writer.add_tokenizer_pre(split)
        writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_eos_token(True)
    if flag is not None:
        writer.add_add_bos_token(flag)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = open_tokenizer(path)
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (adds_bos, True)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
