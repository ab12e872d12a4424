"""Tokenizers of Hugging Face: round trips, and texts after a prefix."""

import functools
import json
from pathlib import Path
import tempfile

from hypothesis import given, settings, strategies
import pytest
from tokenizer_files import BEGIN, END, SPLITS, STYLES, write_sentencepiece, write_tokenizer

from grit_jax.conversion import sidecar_files as companion_files
from grit_jax.text.examples import RejectedExample, chat_text, embedding_text, plain_text
from grit_jax.text.templates import chat_prompt, embedding_prefix
from grit_jax.text.tokenizer import Tokenizer, TokenizerError

PREFIX = embedding_prefix("Find it")
FREQUENT = strategies.sampled_from("ab12 \n\t\r.'<|>é日🙂\u0301\u00a0")
TEXTS = strategies.text(
    strategies.one_of(FREQUENT, strategies.characters(codec="utf-8")), min_size=1, max_size=40
)


@functools.cache
def tokenizer(style):
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(str(write_tokenizer(Path(folder), style)))


@settings(deadline=None)
@given(style=strategies.sampled_from(sorted(SPLITS)), text=TEXTS)
def test_text_of_bytes_comes_back_as_it_was(style, text):
    ids = tokenizer(style).encode(text)
    assert tokenizer(style).decode(ids) == text
    assert tokenizer(style).ids(text).tolist() == ids
    assert max(ids, default=0) < tokenizer(style).vocab_size


@settings(deadline=None)
@given(style=strategies.sampled_from(STYLES), before=TEXTS, text=TEXTS)
def test_a_text_after_a_prefix_has_the_ids_of_both_in_one_string(style, before, text):
    own = tokenizer(style)
    for prefix in (PREFIX, before, f"{before}\n"):
        ids, num_before = own.ids_after(prefix, own.ids(prefix), text)
        assert ids.tolist() == own.encode(prefix + text)
        assert ids[:num_before].tolist() == own.encode(prefix)[:num_before]
        if style in SPLITS:  # The text's own tokens contain all its characters.
            assert own.decode(ids[num_before:].tolist()).endswith(text)
            assert num_before < len(ids)


@settings(deadline=None)
@given(style=strategies.sampled_from(STYLES), text=TEXTS.filter(lambda text: text.strip()))
def test_the_mask_excludes_the_instruction_unless_the_text_begins_with_space(style, text):
    own = tokenizer(style)
    whole = embedding_text(own, "Find it", text, 1000)
    assert whole.tokens.tolist() == [own.bos_id, *own.encode(PREFIX + text)]
    if not text[0].isspace():
        assert whole.mask.tolist() == [i > len(own.encode(PREFIX)) for i in range(len(whole))]
    assert whole.mask.any() and not whole.mask[0]


def test_a_token_of_marker_and_text_belongs_to_the_text():
    own = tokenizer("llama3")
    assert len(own.encode(">\n\n")) == len(own.encode(">\n"))  # Both line breaks are one token.
    text = embedding_text(own, "", "\nx", 100)
    assert own.decode(text.tokens[text.mask].tolist()) == "\n\nx"


@settings(deadline=None, max_examples=50)
@given(
    style=strategies.sampled_from(STYLES),
    turns=strategies.lists(TEXTS.filter(lambda text: text.strip()), min_size=2, max_size=4),
)
def test_an_answer_is_trained_on_after_the_ids_of_its_prompt(style, turns):
    own = tokenizer(style)
    chat = chat_text(own, turns, 100_000)
    position, tokens = 1, chat.tokens.tolist()
    for first in range(0, len(turns) - 1, 2):
        prompt = own.encode(chat_prompt(turns[first], is_first=first == 0))
        assert tokens[position : position + len(prompt)] == prompt
        end = tokens.index(own.eos_id, position)
        mask = chat.mask[position : end + 1].tolist()
        assert mask == [False] * len(prompt) + [True] * (end + 1 - position - len(prompt))
        if style in SPLITS:
            answer = own.decode(tokens[position + len(prompt) : end])
            assert answer == turns[first + 1].strip()
        position = end + 1
    assert position == len(tokens) and tokens[0] == own.bos_id


def test_texts_begin_and_end_as_the_tokenizer_says(tmp_path):
    own = Tokenizer(write_tokenizer(tmp_path, "gpt2", begin=(), end=(END,)))
    prefix, ids = own.encode(PREFIX), own.encode(f"{PREFIX}one two three four")
    for length in (len(ids) + 1, len(ids) - 1):  # The text is cut, and EOS is kept.
        text = embedding_text(own, "Find it", "one two three four", length)
        assert text.tokens.tolist() == [*ids[: length - 1], own.eos_id]
        assert text.mask.tolist() == [i >= len(prefix) for i in range(length)]
    with pytest.raises(RejectedExample, match="instruction alone is too long"):
        embedding_text(own, "Find it", "one", len(prefix) + 1)
    chat = chat_text(own, ["one", "two"], 100)
    assert chat.tokens.tolist() == [*own.encode(f"{chat_prompt('one', is_first=True)}two"), 1]
    plain = plain_text(own, "one two", 100)
    assert plain.tokens.tolist() == [*own.encode("one two"), own.eos_id]
    assert plain.mask.tolist() == [i > 0 for i in range(len(plain))]


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_in_a_text_are_text(style):
    own = tokenizer(style)
    text = f"a{END}b {BEGIN}"
    assert not {own.bos_id, own.eos_id} & set(own.encode(text))
    assert own.decode([own.bos_id, *own.encode(text), own.eos_id]) == text


def test_begin_and_end_token_are_found_in_the_files_next_to_the_tokenizer(tmp_path):
    path = write_tokenizer(tmp_path, "gpt2")
    first = Tokenizer(str(path))
    assert [first.bos_id, first.eos_id] == [0, 1]
    files = {
        "tokenizer_config.json": {"bos_token": None, "eos_token": "not there"},
        "special_tokens_map.json": {"bos_token": {"content": END}},
        "config.json": {"bos_token_id": 7, "eos_token_id": [2, 0]},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    second = Tokenizer(str(path))
    assert [second.bos_id, second.eos_id] == [1, 2]
    assert second.fingerprint != first.fingerprint
    (tmp_path / "config.json").unlink()
    with pytest.raises(TokenizerError, match=r"unknown: set 'eos_token' in .*_config\.json"):
        Tokenizer(str(path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json is not JSON"):
        Tokenizer(str(path))


@pytest.mark.parametrize("style", STYLES)
def test_an_export_leaves_the_tokenizer_as_it_is(tmp_path, style):
    own = tokenizer(style)
    before = own.files, dict(own.special_tokens)
    companion_files.write_tokenizer(own, tmp_path, "mistral", 512)
    assert (own.files, own.special_tokens) == before
    written = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert written == {**own.special_tokens, "pad_token": END}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match=rf"{name}: not a "):
        Tokenizer(str(tmp_path / name))


def test_a_sentencepiece_model_may_lack_bos_but_not_eos(tmp_path):
    path = write_sentencepiece(tmp_path, 300, byte_fallback=True, bos_id=-1)
    own = Tokenizer(path)
    assert (own.bos_id, own.adds_bos, own.files) == (None, False, Tokenizer(path).files)
    path = write_sentencepiece(tmp_path, 300, byte_fallback=True, eos_id=-1)
    with pytest.raises(TokenizerError, match=r"other\.model: its eos_token is unknown"):
        Tokenizer(str(path))
