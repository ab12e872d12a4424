"""Input formats: the JSON objects that a line may hold, and their canonical forms.

Embedding examples:

    {"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}

A plain string instead of a pair is a text without an instruction.

Chats:

    {"text": [user, assistant, ...]}
    {"messages": [{"role": "user", "content": ...}, ...]}
    {"text": "any text"}     plain text, trained on from its first token
"""

from collections.abc import Callable
from typing import Any

from grit_jax.text.examples import NO_PROMPT, RejectedExample

# A user's function on the object of each line: returns another object, or None to skip the line.
Preprocess = Callable[[dict[str, Any]], dict[str, Any] | None]


def canonical_embedding(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns `{"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}`.

    Raises:
      RejectedExample: a field has the wrong type.
    """
    return {
        "query": _pair(raw["query"], "query"),
        "pos": _pairs(raw, "pos"),
        "neg": _pairs(raw, "neg"),
    }


def _pairs(raw: dict[str, Any], name: str) -> list[list[str]]:
    passages = raw.get(name)
    if passages is None:
        return []
    if not isinstance(passages, list):
        raise RejectedExample(f"{name!r} is not a list")
    return [_pair(passage, name) for passage in passages]


def _pair(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return ["", _valid_text(value)]
    match value:
        case [str(instruction), str(text)]:
            return [_valid_text(instruction), _valid_text(text)]
    raise RejectedExample(f"{name!r} is neither a text nor [instruction, text]")


def canonical_chat(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns `{"text": [user, assistant, ...]}`; plain text becomes `[NO_PROMPT, text]`.

    Raises:
      RejectedExample: a field has the wrong type, or the roles do not alternate.
    """
    if "text" not in raw:
        return {"text": _chat(turns_of_messages(raw["messages"]))}
    text = raw["text"]
    if isinstance(text, str):
        return {"text": [NO_PROMPT, _valid_text(text)]}
    if not isinstance(text, list) or not all(isinstance(turn, str) for turn in text):
        raise RejectedExample("'text' is neither a text nor a list of turns")
    return {"text": _chat([_valid_text(turn) for turn in text])}


def _chat(turns: list[str]) -> list[str]:
    if turns[:1] == [NO_PROMPT]:
        raise RejectedExample("empty turn")
    return turns


def _valid_text(text: str) -> str:
    """Returns `text` unchanged if SentencePiece accepts it."""
    if "\0" in text:
        raise RejectedExample("NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RejectedExample("half of a surrogate pair") from None
    return text


def turns_of_messages(messages: Any) -> list[str]:
    """Returns alternating user and assistant turns.

    A system message is prepended to the user message that follows it.

    Raises:
      RejectedExample: `messages` is not a list of messages, or user and assistant do not alternate.
    """
    turns, system = [], []
    if not isinstance(messages, list):
        raise RejectedExample("'messages' is not a list")
    for message in messages:
        role, content = _role_and_content(message)
        if role == "system":
            system.append(content)
        elif role != ("user", "assistant")[len(turns) % 2]:
            raise RejectedExample("user and assistant do not alternate")
        else:
            turns.append("\n\n".join([*system, content]))
            system = []
    return turns


def _role_and_content(message: Any) -> tuple[str, str]:
    role, content = (
        (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(content, str):
        raise RejectedExample("a message whose role or content is not a string")
    return role, _valid_text(content)


def tulu2(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Skips the lines of Tulu 2 in which the assistant calls itself Tulu."""
    return None if raw.get("dataset") == "hard_coded" else raw
