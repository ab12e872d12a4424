"""Token ids and masks equal to the original's, and the reasons for rejecting an example."""

import functools
import json
from pathlib import Path

from hypothesis import given, settings, strategies
import numpy as np
import pytest
from tokenizer_files import write_sentencepiece

from grit_jax.text.examples import (
    ChatExample,
    EmbeddingExample,
    RejectedExample,
    Text,
    TextOptions,
    chat_example,
    chat_text,
    embedding_example,
    embedding_text,
)
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import tokenizer_path

COLLATION = json.loads((Path(__file__).parents[1] / "reference" / "collation.json").read_text())
CASES = [case for case in COLLATION["cases"].values() if not case["prefixlm"]]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def unpadded(collated, row):
    """Returns the ids of a row of the original's batch, which is padded with masked `<s>`."""
    length = sum(collated["attention_mask"][row])
    return collated["input_ids"][row][:length]


def test_ids_of_plain_text_are_the_original_ones(tokenizer):
    compared = 0
    for case in COLLATION["tokenise"]:
        if "<s>" not in case["text"] and "</s>" not in case["text"]:
            assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == case["ids_special"]
            compared += 1
    assert compared >= 6


def test_embedding_texts_have_the_ids_of_the_original_batches(tokenizer):
    compared = 0
    for case in CASES:
        pairs = [sample for sample in case["samples"] if isinstance(sample[0], list)]
        if not pairs or len(pairs) != len(case["samples"]) or "query" not in case["batch"]:
            continue
        queries, passages = case["batch"]["query"], case["batch"]["passage"]
        for row, sample in enumerate(pairs):
            ours = embedding_text(tokenizer, *sample[0], case["query_max_len"])
            assert ours.tokens.tolist() == unpadded(queries, row)
            for index, pair in enumerate(sample[1]):
                ours = embedding_text(tokenizer, *pair, case["passage_max_len"])
                assert ours.tokens.tolist() == unpadded(passages, len(sample[1]) * row + index)
                compared += 1
    assert compared >= 4


def test_the_mask_excludes_only_the_instruction(tokenizer):
    text = embedding_text(tokenizer, "\tFind it: \n", "a world of words", 64)
    whole = "<|user|>\nFind it\n<|embed|>\na world of words"
    assert tokenizer.decode(text.tokens.tolist()) == whole
    assert tokenizer.decode(text.tokens[text.mask].tolist()) == "a world of words"
    assert text.tokens[0] == tokenizer.bos_id and not text.mask[0]
    bare = embedding_text(tokenizer, "", "words", 64)
    assert tokenizer.decode(bare.tokens.tolist()) == "<|embed|>\nwords"


def test_chats_have_the_ids_of_the_original_and_labels_that_do_not_drift(tokenizer):
    turns = COLLATION["cases"]["multi_turn_trunc"]["samples"][0][2]
    theirs = COLLATION["cases"]["multi_turn_trunc"]["batch"]["generative"]
    ours = chat_text(tokenizer, turns, 64)
    assert ours.tokens.tolist() == unpadded(theirs, 0)
    first_turn = ours.tokens.tolist().index(tokenizer.eos_id) + 1
    is_label = np.array(theirs["labels"][0][:first_turn]) != -100
    np.testing.assert_array_equal(ours.mask[:first_turn], is_label)
    # The mask selects every answer and its </s>; the original's labels drift.
    learned = ours.tokens[ours.mask].tolist()
    answers = [tokenizer.encode(f"\n{turn.strip()}")[2:] for turn in turns[1::2]]
    assert learned == [token for ids in answers for token in [*ids, tokenizer.eos_id]]


def test_a_plain_text_has_the_ids_of_the_original_between_begin_and_end(tokenizer):
    case = COLLATION["cases"]["plain"]
    for row, sample in enumerate(case["samples"]):
        own = unpadded(case["batch"]["generative"], row)
        raw = TEXT_KINDS["generative"].to_canonical({"text": sample[2]})
        ours = chat_example(tokenizer, raw, TextOptions(chat_length=64)).chat
        assert ours.tokens.tolist() == [tokenizer.bos_id, *own, tokenizer.eos_id]
        assert ours.mask.tolist() == [False] + [True] * (len(own) + 1)
    cut = chat_example(tokenizer, raw, TextOptions(chat_length=2)).chat
    assert cut.tokens.tolist() == [tokenizer.bos_id, own[0]]
    with pytest.raises(RejectedExample, match="empty text"):
        chat_example(tokenizer, TEXT_KINDS["generative"].to_canonical({"text": " "}), TextOptions())


def test_the_labels_of_the_original_are_an_option(tokenizer):
    case = COLLATION["cases"]["multi_turn_trunc"]
    labels = np.array(case["batch"]["generative"]["labels"][0])
    ours = chat_text(tokenizer, case["samples"][0][2], 64, labels="original")
    np.testing.assert_array_equal(ours.mask, labels[: len(ours)] != -100)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: embedding_text(t, "find", " \n", 64), "empty text"),
        (lambda t: embedding_text(t, "find " * 40, "x", 32), "instruction alone"),
        (lambda t: chat_text(t, ["hello"], 64), "without an answer"),
        (lambda t: chat_text(t, ["hello", ""], 64), "empty turn"),
        (lambda t: chat_text(t, ["hello", " \n"], 64), "empty turn"),
        (lambda t: chat_text(t, ["hello", "x", " ", "y"], 64), "empty turn"),
        (lambda t: chat_text(t, [], 64), "without an answer"),
        (lambda t: chat_text(t, ["hello " * 40, "x"], 32), "prompt alone"),
        (
            lambda t: embedding_example(
                t, {"query": ["", "x"], "pos": [], "neg": []}, TextOptions()
            ),
            "no positive",
        ),
    ],
)
def test_what_cannot_be_used_is_rejected_with_the_reason(tokenizer, make, reason):
    with pytest.raises(RejectedExample, match=reason):
        make(tokenizer)


def test_an_instruction_must_leave_room_for_one_token_of_the_text(tokenizer):
    length = int(np.argmax(embedding_text(tokenizer, "find it", "text", 64).mask))
    with pytest.raises(RejectedExample, match="instruction alone"):
        embedding_text(tokenizer, "find it", "text", length)
    assert embedding_text(tokenizer, "find it", "text", length + 1).mask.sum() == 1


@pytest.mark.parametrize("bad", ["query", "pos", "neg"])
def test_an_empty_text_anywhere_rejects_the_example(tokenizer, bad):
    raw = {"query": ["", "x"], "pos": [["", "y"]], "neg": [["", "z"]]}
    raw[bad] = ["", " "] if bad == "query" else [*raw[bad], ["", " "]]
    with pytest.raises(RejectedExample, match="empty text"):
        embedding_example(tokenizer, raw, TextOptions())


def test_instructions_are_as_long_as_the_original_says(tokenizer):
    case = COLLATION["cases"]["multi_turn_trunc"]
    passages = [pair for sample in case["samples"] for pair in sample[1]]
    lengths = case["batch"]["passage"]["instruction_lens"]
    for pair, length in zip(passages, lengths, strict=True):
        mask = embedding_text(tokenizer, *pair, case["passage_max_len"]).mask
        np.testing.assert_array_equal(mask, np.arange(len(mask)) >= length)


def test_each_kind_of_text_is_cut_to_its_own_length(tokenizer):
    lengths = TextOptions(query_length=20, passage_length=30, chat_length=40)
    long = "word " * 100
    raw = {"query": ["", long], "pos": [["", long]], "neg": [["", long], ["", long]]}
    example = embedding_example(tokenizer, raw, lengths)
    assert [len(text) for text in example.texts] == [20, 30, 30, 30]
    assert len(chat_example(tokenizer, {"text": ["q", long]}, lengths).chat) == 40


def test_markers_in_a_text_never_become_special_tokens(tokenizer):
    for text in ("<s>", "a</s>\n<|user|>\nb", "<unk>", "x <s> y"):
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text))


# U+2581 stands for a space in SentencePiece.
characters = strategies.characters(exclude_categories=["C", "Z"], exclude_characters="\u2581")
turns = strategies.lists(strategies.text(characters, min_size=1), min_size=1, max_size=4)


@settings(deadline=None, max_examples=50)
@given(strategies.lists(strategies.tuples(turns.map(" ".join), turns.map(" ".join)), min_size=1))
def test_only_answers_are_trained_on_in_any_script(pairs):
    tokenizer = Tokenizer()
    text = chat_text(tokenizer, [f" {turn}\n" for pair in pairs for turn in pair], 100_000)
    learned = text.tokens[text.mask].tolist()
    answers = []
    while learned:
        end = learned.index(tokenizer.eos_id)
        answers.append(tokenizer.decode(learned[:end]))
        learned = learned[end + 1 :]
    assert answers == [answer for _, answer in pairs]


def test_a_last_question_without_an_answer_is_dropped(tokenizer):
    whole = chat_text(tokenizer, ["q", "a", "again?"], 64)
    assert whole.tokens.tolist() == chat_text(tokenizer, ["q", "a"], 64).tokens.tolist()


texts = strategies.lists(
    strategies.tuples(strategies.integers(0, 150_000), strategies.booleans()), min_size=1
).map(
    lambda pairs: Text(np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs]))
)


def assert_same(one, other):
    assert len(one.texts) == len(other.texts)
    for left, right in zip(one.texts, other.texts, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.mask, right.mask)


@settings(deadline=None)
@given(texts, strategies.lists(texts, min_size=1, max_size=3), strategies.lists(texts, max_size=3))
def test_records_give_back_their_example(query, positives, negatives):
    example = EmbeddingExample(query, positives, negatives)
    restored = EmbeddingExample.from_bytes(example.to_bytes())
    assert isinstance(restored, EmbeddingExample)
    assert len(restored.positives) == len(positives)
    assert_same(example, restored)
    chat = ChatExample.from_bytes(ChatExample(query).to_bytes())
    assert isinstance(chat, ChatExample)
    assert_same(ChatExample(query), chat)


def test_a_tokenizer_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.model"):
        tokenizer_path(str(tmp_path / "missing.model"))
    with pytest.raises(FileNotFoundError, match=r"the folder has no tokenizer\.json"):
        tokenizer_path(str(tmp_path))


spaced = strategies.text("ab<|.é日🙂 \n\t\u2581", max_size=40)


@settings(deadline=None)
@given(spaced, spaced)
def test_ids_from_the_cache_of_words_are_those_of_the_whole_text(first, second):
    tokenizer = cached_tokenizer()
    assert tokenizer.ids(first).tolist() == tokenizer.encode(first)
    prefix = f"{first}\n"
    ids, num_before = tokenizer.ids_after(prefix, tokenizer.ids(prefix), second)
    assert ids.tolist() == tokenizer.encode(prefix + second)
    assert num_before == len(tokenizer.encode(prefix))


@functools.cache
def cached_tokenizer():
    return Tokenizer()


def test_the_ids_of_long_text_are_the_same_when_it_is_encoded_again(tokenizer):
    text = (Path(__file__).parents[2] / "docs" / "decisions.md").read_text()
    for _ in range(2):
        assert tokenizer.ids(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram"},
        {"user_defined_symbols": ["<|a b|>"]},
    ],
)
def test_models_that_do_not_split_at_words_have_the_same_ids(tmp_path, options):
    """Models whose pieces span words, or that change spaces, are not applied word by word."""
    lines = [f"the quick brown fox {number} of the same  kind" for number in range(200)]
    options = {
        "byte_fallback": True,
        "model_type": "bpe",
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        **options,
    }
    other = Tokenizer(str(write_sentencepiece(tmp_path, 350, lines, **options)))
    prefix = "<|user|>\nof the same\n<|embed|>\n"
    for text in ("the quick", " the  same ", "of the same kind\n\n of", "<|a b|> fox", "\n", ""):
        assert other.ids(text).tolist() == other.encode(text)
        ids, _ = other.ids_after(prefix, other.ids(prefix), text)
        assert ids.tolist() == other.encode(prefix + text)


def test_a_text_without_tokens_is_rejected(tmp_path):
    """Nothing would be pooled: its embedding would be zeros."""
    other = Tokenizer(str(write_sentencepiece(tmp_path, 60)))
    assert any(embedding_text(other, "find", "fox", 64).mask)
    for instruction in ("find", ""):
        with pytest.raises(RejectedExample, match="empty text"):
            embedding_text(other, instruction, "\u200b", 64)
