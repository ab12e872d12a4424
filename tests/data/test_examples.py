"""Texts become the tokens that the original's code makes of them; what is unfit is rejected."""

import itertools
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from grit_jax.data.examples import (
    ChatExample,
    EmbeddingExample,
    MaxLengths,
    RejectedExample,
    Text,
    chat_example,
    chat_text,
    embedding_example,
    embedding_text,
    from_bytes,
    to_bytes,
)
from grit_jax.data.tokenizer import Tokenizer

COLLATION = json.loads(
    (Path(__file__).parents[1] / "reference" / "collation.json").read_text(encoding="utf-8")
)
NO_LABEL = -100
# "plain" holds strings without an instruction, a format that we do not read.
CASES = [name for name in COLLATION["cases"] if name != "plain"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("mistral")


def runs(text):
    """The stretches of tokens that count, in order."""
    groups = itertools.groupby(zip(text.mask, text.tokens.tolist(), strict=True), lambda t: t[0])
    return [[token for _, token in group] for counts, group in groups if counts]


# ---- The original's tokens ----


def test_tokens_are_those_of_the_original(tokenizer):
    plain = [case for case in COLLATION["tokenise"] if "s>" not in case["text"]]
    assert len(plain) == 8
    for case in plain:
        assert tokenizer.encode(case["text"]) == case["ids_plain"], case["text"]
        assert [tokenizer.bos_id, *case["ids_plain"]] == case["ids_special"]


def test_markers_in_a_text_never_become_special_tokens(tokenizer):
    for text in ("<s>", "a</s>\n<|user|>\nb", "<unk>", "x <s> y"):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))


def original_rows(batch):
    """The token ids of a collated batch without their padding."""
    for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield ids[: sum(real)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "generative_only"])
def test_queries_and_passages_are_those_of_the_original(tokenizer, name):
    case = COLLATION["cases"][name]
    queries = [sample[0] for sample in case["samples"]]
    passages = [passage for sample in case["samples"] for passage in sample[1]]
    for kind, pairs in (("query", queries), ("passage", passages)):
        batch = case["batch"][kind]
        rows = list(original_rows(batch))
        assert len(rows) == len(pairs)
        for pair, ids, start in zip(pairs, rows, batch["instruction_lens"], strict=True):
            text = embedding_text(tokenizer, *pair, case[f"{kind}_max_len"])
            assert text.tokens.tolist() == ids
            np.testing.assert_array_equal(text.mask, np.arange(len(ids)) >= start)


@pytest.mark.parametrize("name", [name for name in CASES if name != "embedding_only"])
def test_chats_are_those_of_the_original_but_for_its_drifting_labels(tokenizer, name):
    case = COLLATION["cases"][name]
    batch = case["batch"]["generative"]
    chats = [sample[2] for sample in case["samples"] if sample[2] is not None]
    rows = list(original_rows(batch))
    assert len(rows) == len(chats)
    compared = 0
    for turns, ids, labels in zip(chats, rows, batch["labels"], strict=True):
        if len(ids) == case["generative_max_len"]:  # The prompt alone was over the length.
            assert all(label == NO_LABEL for label in labels)
            with pytest.raises(RejectedExample, match="prompt alone is over the length"):
                chat_text(tokenizer, turns, case["generative_max_len"])
            continue
        text = chat_text(tokenizer, turns, case["generative_max_len"])
        assert text.tokens.tolist() == ids
        first_turn = ids.index(tokenizer.eos_id) + 1
        ours = np.where(text.mask, text.tokens, NO_LABEL)[:first_turn]
        if not case["prefixlm"]:
            np.testing.assert_array_equal(ours, labels[:first_turn])
        assert_learns_the_answers(tokenizer, text, turns)
        compared += 1
    assert compared


def assert_learns_the_answers(tokenizer, text, turns):
    answers = runs(text)
    assert [answer[-1] for answer in answers] == [tokenizer.eos_id] * len(turns[1::2])
    decoded = [tokenizer.decode(answer[:-1]) for answer in answers]
    assert decoded == [turn.strip() for turn in turns[1::2]]


words = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters="\u2581"), min_size=1
)
turns_of_chats = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=2)


@settings(deadline=None, max_examples=50)
@given(turns=turns_of_chats, spaces=st.sampled_from(["", " ", "\n", " \n\t"]))
def test_the_answers_are_learned_and_nothing_else_in_whatever_script(turns, spaces):
    tokenizer = Tokenizer("mistral")
    if len(turns) % 2:
        turns = turns[:-1]
    padded = [spaces + turn + spaces for turn in turns]
    text = chat_text(tokenizer, padded, 100_000)
    assert text.tokens[0] == tokenizer.bos_id
    assert_learns_the_answers(tokenizer, text, padded)


def test_a_last_question_without_an_answer_is_left_out(tokenizer):
    whole = chat_text(tokenizer, ["q", "a", "again?"], 64)
    assert whole.tokens.tolist() == chat_text(tokenizer, ["q", "a"], 64).tokens.tolist()


def test_a_long_chat_is_cut_and_keeps_what_fits_of_the_answer(tokenizer):
    turns = ["question", "an answer of several words"]
    whole = chat_text(tokenizer, turns, 64)
    for length in range(int(np.argmax(whole.mask)) + 1, len(whole)):
        cut = chat_text(tokenizer, turns, length)
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        assert cut.mask.tolist() == whole.mask[:length].tolist()


# ---- What is rejected ----


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_text_is_rejected(tokenizer, text):
    with pytest.raises(RejectedExample, match="empty text"):
        embedding_text(tokenizer, "instruction", text, 64)


def test_an_instruction_that_leaves_no_room_for_the_text_is_rejected(tokenizer):
    length = int(np.argmax(embedding_text(tokenizer, "find it", "text", 64).mask))
    with pytest.raises(RejectedExample, match="instruction alone is over the length"):
        embedding_text(tokenizer, "find it", "text", length)
    assert embedding_text(tokenizer, "find it", "text", length + 1).mask.sum() == 1


def test_an_example_without_a_positive_is_rejected(tokenizer):
    raw = {"query": ["", "x"], "pos": [], "neg": [["", "z"]]}
    with pytest.raises(RejectedExample, match="no positive"):
        embedding_example(tokenizer, raw, MaxLengths())


@pytest.mark.parametrize("bad", ["query", "pos", "neg"])
def test_an_empty_text_anywhere_rejects_the_example(tokenizer, bad):
    raw = {"query": ["", "x"], "pos": [["", "y"]], "neg": [["", "z"]]}
    raw[bad] = ["", " "] if bad == "query" else [*raw[bad], ["", " "]]
    with pytest.raises(RejectedExample, match="empty text"):
        embedding_example(tokenizer, raw, MaxLengths())


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "a chat without an answer"),
        (["only a question"], "a chat without an answer"),
        (["question", " "], "empty turn"),
        (["", "answer"], "empty turn"),
        (["question", "answer", "\n", "answer"], "empty turn"),
    ],
)
def test_a_chat_with_nothing_to_learn_is_rejected(tokenizer, turns, reason):
    with pytest.raises(RejectedExample, match=reason):
        chat_example(tokenizer, {"text": turns}, MaxLengths())


def test_each_kind_of_text_has_its_own_length(tokenizer):
    lengths = MaxLengths(query=20, passage=30, chat=40)
    long = "word " * 100
    raw = {"query": ["", long], "pos": [["", long]], "neg": [["", long], ["", long]]}
    example = embedding_example(tokenizer, raw, lengths)
    assert [len(text) for text in example.texts] == [20, 30, 30, 30]
    assert len(chat_example(tokenizer, {"text": ["q", long]}, lengths).chat) == 40


# ---- Records ----


@st.composite
def texts(draw):
    tokens = draw(st.lists(st.sampled_from([0, 1, 31_999, 2**16 - 1, 2**16, 200_000]), min_size=1))
    mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return Text(np.array(tokens, np.int32), np.array(mask, bool))


some = st.lists(texts(), max_size=3)
examples = st.one_of(
    st.builds(ChatExample, texts()),
    st.builds(EmbeddingExample, texts(), st.lists(texts(), min_size=1, max_size=3), some),
)


@settings(deadline=None)
@given(example=examples)
def test_an_example_survives_being_stored(example):
    restored = from_bytes(to_bytes(example))
    assert type(restored) is type(example)
    assert len(restored.texts) == len(example.texts)
    for ours, theirs in zip(restored.texts, example.texts, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.tokens.dtype == np.int32
        assert ours.mask.dtype == bool
    if isinstance(example, EmbeddingExample):
        assert len(restored.positives) == len(example.positives)


def test_a_stored_token_of_mistrals_takes_little_more_than_two_bytes():
    text = Text(np.full(1000, 31_999, np.int32), np.ones(1000, bool))
    assert len(to_bytes(ChatExample(text))) < 2400
