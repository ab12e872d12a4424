"""The prepared record of a line equals the reference, for each kind of text.

If a change of the token ids, masks or bytes is meant, raise `TEXT_VERSION` and write the reference
again: python tests/text/test_golden.py
"""

import json
from pathlib import Path

import pytest

from grit_jax.text import TEXT_VERSION
from grit_jax.text.examples import TextOptions
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference" / "tokenized_examples.json"
OPTIONS = {"query_length": 24, "passage_length": 32, "chat_length": 48}
LINES = {
    "embedding": [
        {
            "query": ["Given a word, find its meaning", "cat"],
            "pos": [["", "a small furry animal"], ["", "Katze"]],
            "neg": [["", "a machine"]],
        },
        {"query": "plain query", "pos": ["plain passage 日本語 🙂"]},
        {
            "query": ["Find it :\n", "  two  spaces\tand a tab"],
            "pos": [["Represent the text", "line one\n\nline two"]],
            "neg": ["<s> is text </s>", "a passage that is cut " * 9],
        },
    ],
    "generative": [
        {"text": ["hello", "world"]},
        {"text": ["first question", " first answer ", "second question", "answer\n", "dropped"]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because."},
            ]
        },
        {"text": "Plain text, trained on from its first token. 日本語"},
        {"text": ["count", "one two three four five " * 9]},
    ],
}


def tokenized(kind, line):
    kind = TEXT_KINDS[kind]
    example = kind.tokenize(Tokenizer(), kind.to_canonical(line), TextOptions(**OPTIONS))
    return {
        "tokens": [text.tokens.tolist() for text in example.texts],
        "mask": ["".join("01"[int(counts)] for counts in text.mask) for text in example.texts],
        "bytes": example.to_bytes().hex(),
    }


def test_every_kind_of_text_has_reference_lines():
    assert LINES.keys() == TEXT_KINDS.keys()


@pytest.mark.parametrize("kind", LINES)
def test_examples_are_written_as_in_the_reference(kind):
    reference = json.loads(REFERENCE.read_text())
    advice = f"raise TEXT_VERSION, and run python {Path(__file__).name}"
    assert reference["text_version"] == TEXT_VERSION, advice
    assert [tokenized(kind, line) for line in LINES[kind]] == reference[kind], advice


@pytest.mark.parametrize("kind", LINES)
def test_the_bytes_of_the_reference_become_examples_again(kind):
    for expected in json.loads(REFERENCE.read_text())[kind]:
        example = TEXT_KINDS[kind].example.from_bytes(bytes.fromhex(expected["bytes"]))
        assert [text.tokens.tolist() for text in example.texts] == expected["tokens"]
        assert example.to_bytes().hex() == expected["bytes"]


if __name__ == "__main__":
    examples = {kind: [tokenized(kind, line) for line in lines] for kind, lines in LINES.items()}
    REFERENCE.write_text(json.dumps({"text_version": TEXT_VERSION, **examples}) + "\n")
