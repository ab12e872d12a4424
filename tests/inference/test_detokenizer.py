"""Incremental decoding equals decoding all at once, in whole characters, up to stop strings."""

import functools
import json
from pathlib import Path
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from tokenizer_files import write_tokenizer

from grit_jax.inference.detokenizer import IncrementalDetokenizer
from grit_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
OF_BYTES = ("gpt2", "smollm", "llama3")
TEXTS = st.text(alphabet=st.sampled_from("ab  \n.é日🙂🏽ſ<|>/s"), min_size=1, max_size=40)


@functools.cache
def tokenizer_of_bytes(style):
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(str(write_tokenizer(Path(folder), style)))


def run(ids, stop=(), tokenizer=TOKENIZER):
    pieces = IncrementalDetokenizer(tokenizer, stop)
    shown = []
    for token in ids:
        shown.append(pieces.push(token))
        if pieces.is_stopped:
            break
    shown.append(pieces.finish())
    assert "".join(shown) == pieces.text
    return pieces.text, shown


@settings(deadline=None)
@given(text=TEXTS)
def test_pieces_are_the_text_behind_a_prompt(text):
    prompt = "x\n"
    ids = TOKENIZER.encode(prompt + text)[len(TOKENIZER.encode(prompt)) :]
    whole, shown = run(ids)
    assert whole == text
    assert not any("\ufffd" in piece for piece in shown)


@settings(deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(3, 31999)), max_size=20))
def test_any_tokens_give_what_they_give_at_once(ids):
    before = TOKENIZER.encode("x")
    assert run(ids)[0] == TOKENIZER.decode([*before, *ids])[1:]


@settings(deadline=None)
@given(
    style=st.sampled_from(OF_BYTES),
    text=st.text(st.characters(codec="utf-8"), max_size=20),
    ids=st.lists(st.integers(0, 699), max_size=20),
)
def test_tokens_of_bytes_give_what_they_give_at_once(style, text, ids):
    own = tokenizer_of_bytes(style)
    whole, shown = run(own.encode(text), tokenizer=own)
    assert whole == text
    # A character is shown when its bytes are complete, in whatever tokens they are.
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in shown)
    assert run(ids, tokenizer=own)[0] == own.decode(ids)
    cut = own.encode("🙂")
    assert len(cut) > 1 and run(cut[:-1], tokenizer=own)[1][:-1] == [""] * (len(cut) - 1)


def test_the_space_before_a_first_word_is_kept():
    assert run(TOKENIZER.encode("word"))[0] == " word"


def test_a_tokenizer_that_keeps_a_space_before_every_text(tmp_path):
    path = write_tokenizer(tmp_path, "gpt2")
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(str(path))
    text, shown = run(tokenizer.encode("one more word"), tokenizer=tokenizer)
    assert text == " one more word" and len(shown) > 3


def test_tokens_that_only_the_model_has_leave_no_trace():
    ids = TOKENIZER.encode("word")
    assert run([32_000, *ids, 40_000])[0] == " word"
    assert TOKENIZER.decode([32_000, *ids, 40_000]) == "word"


@settings(deadline=None)
@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab .\né", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    ids = TOKENIZER.encode("x\n" + text)[len(TOKENIZER.encode("x\n")) :]
    starts = [text.find(stop) for stop in stops if stop in text]
    whole, shown = run(ids, stops)
    assert whole == text[: min(starts, default=len(text))] or whole == first_to_come(
        text, stops, ids
    )
    assert not any(stop in whole for stop in stops)
    assert "".join(shown) == whole


def first_to_come(text, stops, ids):
    """Returns the text before the stop string that is complete first, token by token."""
    for count in range(1, len(ids) + 1):
        so_far = run(ids[:count])[0]
        starts = [so_far.find(stop) for stop in stops if stop in so_far]
        if starts:
            return so_far[: min(starts)]
    return text


def test_a_stop_string_that_lies_across_tokens():
    ids = TOKENIZER.encode("one two</s three")
    assert len(TOKENIZER.encode("</s")) > 1
    text, shown = run(ids, ["</s"])
    assert text == " one two"
    assert shown[:2] == [" one", " two"]


@pytest.mark.parametrize("end", ["<", "</"])
def test_what_only_began_as_a_stop_string_is_shown_in_the_end(end):
    assert run(TOKENIZER.encode(f"one{end}"), ["</s"])[0] == f" one{end}"
