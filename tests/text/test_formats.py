"""The forms of a line: what is accepted as what, and what is refused and why."""

import pytest

from grit_jax.text.examples import NO_PROMPT, RejectedExample
from grit_jax.text.formats import tulu2
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


def test_other_fields_are_of_no_account():
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
        ("generative", {"messages": [message("tool", "u")]}, "do not alternate"),
    ],
)
def test_another_form_is_rejected_with_the_reason(kind, line, reason):
    with pytest.raises(RejectedExample, match=reason):
        TEXT_KINDS[kind].to_canonical(line)


def test_a_systems_text_goes_before_the_users_that_follows():
    messages = [
        message("system", "be kind"),
        message("user", "hello"),
        message("assistant", "hi"),
        message("system", "be brief"),
        message("user", "again"),
        message("assistant", "yes"),
    ]
    assert GENERATIVE.to_canonical({"messages": messages}) == {
        "text": ["be kind\n\nhello", "hi", "be brief\n\nagain", "yes"]
    }


def test_tulus_lines_on_itself_are_left_out():
    assert tulu2({"dataset": "hard_coded", "messages": []}) is None
    line = {"dataset": "flan_v2", "messages": []}
    assert tulu2(line) is line


def test_the_kind_of_a_line():
    assert kind_of_line(PAIR) == "embedding"
    assert kind_of_line({"text": []}) == kind_of_line({"messages": []}) == "generative"
    assert kind_of_line({"title": ""}) is None
