"""Input formats: canonical forms, and the reasons for rejecting a line."""

import pytest

from grit_jax.text.examples import NO_PROMPT, RejectedExample
from grit_jax.text.formats import tulu2, tulu3
from grit_jax.text.kinds import EMBEDDING, GENERATIVE, TEXT_KINDS, kind_of_line

PAIR = {"query": ["find", "q"], "pos": [["", "p"]], "neg": [["i", "n"]]}


def message(role, content):
    return {"role": role, "content": content}


def test_pairs_stay_as_they_are():
    assert EMBEDDING.to_canonical(PAIR) == PAIR


def test_plain_strings_are_texts_without_instruction():
    line = {"query": "q", "pos": ["p", ["i", "p2"]], "neg": ["n"]}
    assert EMBEDDING.to_canonical(line) == {
        "query": ["", "q"],
        "pos": [["", "p"], ["i", "p2"]],
        "neg": [["", "n"]],
    }


def test_a_plain_text_has_no_prompt():
    assert GENERATIVE.to_canonical({"text": "any text"}) == {"text": [NO_PROMPT, "any text"]}


@pytest.mark.parametrize("negatives", [{}, {"neg": None}, {"neg": []}])
def test_negatives_may_be_missing(negatives):
    assert EMBEDDING.to_canonical({"query": "q", "pos": ["p"], **negatives})["neg"] == []


def test_other_fields_are_ignored():
    assert EMBEDDING.to_canonical({**PAIR, "id": 3, "text": None}) == PAIR
    assert GENERATIVE.to_canonical({"text": ["u", "a"], "query": 1}) == {"text": ["u", "a"]}


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("embedding", {"text": ["u", "a"]}, "a chat, not an embedding example"),
        ("embedding", {"messages": []}, "a chat, not an embedding example"),
        ("generative", PAIR, "an embedding example, not a chat"),
        ("embedding", {"question": "q"}, "no 'query'"),
        ("generative", {}, "no 'text' or 'messages'"),
        ("embedding", {**PAIR, "query": 3}, "'query' is neither"),
        ("embedding", {**PAIR, "query": ["i", "q", "x"]}, "'query' is neither"),
        ("embedding", {**PAIR, "query": ["i", None]}, "'query' is neither"),
        ("embedding", {**PAIR, "query": {"i": "q"}}, "'query' is neither"),
        ("embedding", {**PAIR, "pos": "p"}, "'pos' is not a list"),
        ("embedding", {**PAIR, "pos": {"a": "b"}}, "'pos' is not a list"),
        ("embedding", {**PAIR, "pos": [["", "p"], 1]}, "'pos' is neither"),
        ("embedding", {**PAIR, "neg": [[["", "n"]]]}, "'neg' is neither"),
        ("embedding", {**PAIR, "neg": [["", "n\0"]]}, "NUL"),
        ("embedding", {**PAIR, "query": "half \ud83d"}, "surrogate"),
        ("generative", {"text": 3}, "'text' is neither a text nor a list"),
        ("generative", {"text": ["u", 1]}, "'text' is neither a text nor a list"),
        ("generative", {"text": ["", "a"]}, "empty turn"),
        ("generative", {"messages": [message("user", ""), message("assistant", "a")]}, "empty"),
        ("generative", {"text": "u\0"}, "NUL"),
        ("generative", {"text": ["u", "a\0"]}, "NUL"),
        ("generative", {"messages": "u"}, "'messages' is not a list"),
        ("generative", {"messages": ["u"]}, "whose role"),
        ("generative", {"messages": [{"role": "user"}]}, "content is not a string"),
        (
            "generative",
            {"messages": [message("user", None)]},
            "content is not a string",
        ),
        ("generative", {"messages": [message("user", [{"text": "a"}])]}, "content is not a string"),
        ("generative", {"messages": [message("assistant", "a")]}, "do not alternate"),
        ("generative", {"messages": [message("user", "u")] * 2}, "do not alternate"),
        (
            "generative",
            {"messages": [message("tool", "u")]},
            "'tool' is unknown: use 'system'",
        ),
        (
            "generative",
            {"messages": [message("developer", "u")]},
            "is unknown: use 'system'$",
        ),
        (
            "generative",
            {"messages": [message("user", "u"), {"role": "assistant", "tool_calls": [{"id": 1}]}]},
            "tool calls, which are not supported",
        ),
        ("embedding", {"query": "q"}, "no 'pos'"),
        ("embedding", {**PAIR, "prompt": 3}, "'prompt' is not a string"),
        ("embedding", {**PAIR, "prompt": "other"}, "'prompt' is another instruction"),
    ],
)
def test_an_invalid_line_is_rejected_with_the_reason(kind, line, reason):
    with pytest.raises(RejectedExample, match=reason):
        TEXT_KINDS[kind].to_canonical(line)


def test_a_system_message_is_prepended_to_the_next_user_message():
    messages = [
        message("system", "be kind"),
        message("user", "hello"),
        message("assistant", "hi"),
        message("system", "be brief"),
        message("user", "again"),
        message("assistant", "yes"),
    ]
    assert GENERATIVE.to_canonical({"messages": messages}) == {
        "text": ["be kind\n\nhello", "hi", "be brief\n\nagain", "yes"],
        "messages": messages,  # For chat templates.
    }


MEDI = {
    "query": ["Represent the question:", "q"],
    "pos": ["Represent the document:", "p"],
    "neg": ["Represent the document:", "n"],
}
MEDI_READ = {
    "query": ["Represent the question:", "q"],
    "pos": [["Represent the document:", "p"]],
    "neg": [["Represent the document:", "n"]],
}
FLAT, NOT_FLAT = "two strings are read as [instr", "two strings is read as two passages"
TURNS = [message("user", "u"), message("assistant", "a")]


@pytest.mark.parametrize(
    ("kind", "line", "expected", "note"),
    [
        # FlagEmbedding: the prompt is the query's instruction.
        (
            "embedding",
            {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "find", "pos_scores": [1.0]},
            {"query": ["find", "q"], "pos": [["", "p"]], "neg": [["", "n"]]},
            "",
        ),
        ("embedding", {**PAIR, "prompt": None}, PAIR, ""),
        ("embedding", {**PAIR, "prompt": "find"}, PAIR, ""),
        ("embedding", MEDI, MEDI_READ, FLAT),
        ("embedding", {**MEDI, "neg": []}, {**MEDI_READ, "neg": []}, FLAT),
        ("embedding", {**MEDI, "neg": None}, {**MEDI_READ, "neg": []}, FLAT),
        (
            "embedding",
            {"query": ["Same task", "q"], "pos": ["Same task", "p"]},
            {"query": ["Same task", "q"], "pos": [["Same task", "p"]], "neg": []},
            FLAT,
        ),
        # Two answers of a question, as in docs/data.md.
        (
            "embedding",
            {"query": ["Find the answer", "q"], "pos": ["p", "p2"], "neg": ["n", "n2"]},
            {
                "query": ["Find the answer", "q"],
                "pos": [["", "p"], ["", "p2"]],
                "neg": [["", "n"], ["", "n2"]],
            },
            NOT_FLAT,
        ),
        (
            "embedding",
            {"query": "q", "pos": ["p", "p2"], "neg": ["n", "p2", "p"]},
            {"query": ["", "q"], "pos": [["", "p"], ["", "p2"]], "neg": [["", "n"]]},
            "a negative that is also a positive is left out",
        ),
        # TRL keeps a text with another template's markers beside its messages.
        (
            "generative",
            {"text": "<|im_start|>user", "messages": TURNS},
            {"text": ["u", "a"]},
            "'messages' is read, and 'text' beside it is not",
        ),
        ("generative", {"text": None, "messages": TURNS}, {"text": ["u", "a"]}, ""),
        ("generative", {"text": "t", "messages": None}, {"text": [NO_PROMPT, "t"]}, ""),
        (
            "generative",
            {"messages": (messages := [message("system", " "), *TURNS])},
            {"text": ["u", "a"], "messages": messages},
            "",
        ),
        (
            "generative",
            {"messages": [*TURNS, message("user", "c")]},
            {"text": ["u", "a", "c"]},
            "the last user message has no answer",
        ),
    ],
)
def test_published_forms_are_read_as_meant_or_noted(kind, line, expected, note):
    kind = TEXT_KINDS[kind]
    canonical = kind.to_canonical(line)
    assert canonical == expected
    notes = kind.notes(line, canonical)
    assert len(notes) == bool(note) and note in "".join(notes)


def test_plain_texts_are_told_from_chats():
    forms = [GENERATIVE.form(GENERATIVE.to_canonical({"text": t})) for t in ("a", ["a", "b"])]
    assert forms == ["plain texts", "chats"]


def test_lines_of_tulu_2_about_itself_are_skipped():
    assert tulu2({"dataset": "hard_coded", "messages": []}) is None
    line = {"dataset": "flan_v2", "messages": []}
    assert tulu2(line) is line
    assert tulu3({"source": "ai2-adapt-dev/tulu_hard_coded_repeated_10", "messages": []}) is None
    assert tulu3(line) is line


def test_the_kind_of_a_line():
    assert kind_of_line(PAIR) == "embedding"
    assert kind_of_line({"text": []}) == kind_of_line({"messages": []}) == "generative"
    assert kind_of_line({"title": ""}) is None
