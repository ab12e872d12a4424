"""The forms in which a line may hold an example, and the one form that each kind is brought into.

embedding    {"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}
             with a plain string in the place of any pair, which has no instruction
generative   {"text": [user, assistant, ...]}
             {"text": "any text"}, which is learned from its first word on
             {"messages": [{"role": "user", "content": ...}, ...]}
"""

from collections.abc import Callable
from typing import Any

from grit_jax.text.examples import NO_PROMPT, RejectedExample
from grit_jax.text.templates import ChatError, turns_of_messages

# What an example has, and how deeply its texts are nested.
FEATURE_RANKS = {"embedding": {"query": 1, "pos": 2, "neg": 2}, "generative": {"text": 1}}

KEYS = {"embedding": ("query",), "generative": ("text", "messages")}
NAMES = {"embedding": "an embedding example", "generative": "a chat"}

# A function on one line's object: another object, or None to leave the line out.
Preprocess = Callable[[dict[str, Any]], dict[str, Any] | None]


def kind_of_line(raw: dict[str, Any]) -> str | None:
    """Returns "embedding" or "generative", or None for a line of neither form."""
    return next((kind for kind, keys in KEYS.items() if any(key in raw for key in keys)), None)


def to_canonical(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the example of a line in the form that `EXAMPLE_MAKERS` read.

    Raises:
      RejectedExample: the line has another form, or its parts have other types.
    """
    if not any(key in raw for key in KEYS[kind]):
        other = kind_of_line(raw)
        if other is not None:
            raise RejectedExample(f"{NAMES[other]} among those of the other kind")
        raise RejectedExample(f"no {' or '.join(map(repr, KEYS[kind]))}")
    if kind == "embedding":
        return {
            "query": _pair(raw["query"], "query"),
            "pos": _pairs(raw, "pos"),
            "neg": _pairs(raw, "neg"),
        }
    if "text" in raw:
        return {"text": _turns(raw["text"])}
    return {"text": _chat(_turns_of_messages(raw["messages"]))}


def _pairs(raw: dict[str, Any], name: str) -> list[list[str]]:
    passages = raw.get(name)
    if passages is None:
        return []
    if not isinstance(passages, list):
        raise RejectedExample(f"{name!r} is not a list")
    return [_pair(passage, name) for passage in passages]


def _pair(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return ["", _readable(value)]
    match value:
        case [str(instruction), str(text)]:
            return [_readable(instruction), _readable(text)]
    raise RejectedExample(f"{name!r} is neither a text nor [instruction, text]")


def _turns(value: Any) -> list[str]:
    if isinstance(value, str):
        return [NO_PROMPT, _readable(value)]
    if not isinstance(value, list) or not all(isinstance(turn, str) for turn in value):
        raise RejectedExample("'text' is neither a text nor a list of turns")
    return _chat([_readable(turn) for turn in value])


def _chat(turns: list[str]) -> list[str]:
    if turns[:1] == [NO_PROMPT]:
        raise RejectedExample("empty turn")
    return turns


def _readable(text: str) -> str:
    """Returns a text that SentencePiece can read."""
    if "\0" in text:
        raise RejectedExample("NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RejectedExample("half of a surrogate pair") from None
    return text


def _turns_of_messages(messages: Any) -> list[str]:
    try:
        turns = turns_of_messages(messages)
    except ChatError as error:
        raise RejectedExample(str(error)) from None
    return [_readable(turn) for turn in turns]


def tulu2(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Leaves out the lines of Tulu 2 in which an assistant speaks of itself as Tulu."""
    return None if raw.get("dataset") == "hard_coded" else raw
