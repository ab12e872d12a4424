"""Input formats: the JSON objects that a line may hold, and their canonical forms.

Embedding examples:

    {"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}

A plain string instead of a pair is a text without an instruction. Further forms of published data
are read as their authors mean them:

    {"query": text, "prompt": instruction, "pos": [...]}                     FlagEmbedding
    {"query": [instruction, text], "pos": [instruction, text], "neg": ...}   MEDI: a flat pair

Chats:

    {"text": [user, assistant, ...]}
    {"messages": [{"role": "user", "content": ...}, ...]}
    {"text": "any text"}     plain text, trained on from its first token

With both, "messages" is read: "text" is then their text in the template of another model.
"""

from collections.abc import Callable
from typing import Any

from grit_jax.text.examples import NO_PROMPT, RejectedExample
from grit_jax.text.templates import ChatError, turns_of_messages

# A user's function on the object of each line: returns another object, or None to skip the line.
Preprocess = Callable[[dict[str, Any]], dict[str, Any] | None]


def canonical_embedding(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns `{"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}`.

    A negative that is also a positive is left out.

    Raises:
      RejectedExample: a field is missing or has the wrong type.
    """
    if "pos" not in raw:
        raise RejectedExample("no 'pos'")
    positives, negatives = _pairs(raw, "pos"), _pairs(raw, "neg")
    return {
        "query": _query(raw),
        "pos": positives,
        "neg": [negative for negative in negatives if negative not in positives],
    }


def _query(raw: dict[str, Any]) -> list[str]:
    instruction, text = _pair(raw["query"], "query")
    prompt = raw.get("prompt") or ""
    if not isinstance(prompt, str):
        raise RejectedExample("'prompt' is not a string")
    if prompt and instruction and prompt != instruction:
        raise RejectedExample("'prompt' is another instruction than that in 'query'")
    return [instruction or _valid_text(prompt), text]


def _pairs(raw: dict[str, Any], name: str) -> list[list[str]]:
    passages = raw.get(name)
    if passages is None:
        return []
    if not isinstance(passages, list):
        raise RejectedExample(f"{name!r} is not a list")
    if passages and _has_flat_pairs(raw):
        passages = [passages]
    return [_pair(passage, name) for passage in passages]


def _has_flat_pairs(raw: dict[str, Any]) -> bool:
    """Returns whether `pos` and `neg` are each one [instruction, text], as in MEDI.

    Two strings may also be two passages. They are a pair if the query is one too, and the first
    string is evidently an instruction: it is the query's as well, or that of `pos` and of `neg`, or
    it ends with a colon like the query's.
    """
    passages = [raw[name] for name in ("pos", "neg") if raw.get(name)]
    if not passages or not all(map(_are_two_texts, (raw["query"], *passages))):
        return False
    instruction, *first = (value[0].strip() for value in (raw["query"], *passages))
    is_shared = first[0] == instruction or (len(first) == 2 and first[0] == first[1])
    return is_shared or all(text.endswith(":") for text in (instruction, *first))


def _are_two_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _pair(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return ["", _valid_text(value)]
    match value:
        case [str(instruction), str(text)]:
            return [_valid_text(instruction), _valid_text(text)]
    raise RejectedExample(f"{name!r} is neither a text nor [instruction, text]")


def canonical_chat(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns `{"text": [user, assistant, ...]}`; plain text becomes `[NO_PROMPT, text]`.

    Messages of the system and other fields of messages, which only chat templates use, are in the
    result's "messages".

    Raises:
      RejectedExample: a field has the wrong type, or the roles do not alternate.
    """
    if "text" not in raw or raw.get("messages"):
        turns = _chat(_turns_of_messages(raw["messages"]))
        messages = [*map(_strings, raw["messages"])]
        is_plain = all({*m} == {"role", "content"} and m["role"] != "system" for m in messages)
        return {"text": turns} if is_plain else {"text": turns, "messages": messages}
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


def _turns_of_messages(messages: Any) -> list[str]:
    try:
        turns = turns_of_messages(messages)
    except ChatError as error:
        raise RejectedExample(str(error)) from None
    return [_valid_text(turn) for turn in turns]


def _strings(message: dict[str, Any]) -> dict[str, str]:
    return {key: _valid_text(text) for key, text in message.items() if isinstance(text, str)}


def notes_on_embedding(raw: dict[str, Any], canonical: dict[str, Any]) -> list[str]:
    """Returns what `canonical_embedding` did to a line that its author may not expect."""
    notes = []
    if _has_flat_pairs(raw):
        notes.append("'pos' and 'neg' of two strings are read as [instruction, text]")
    elif _are_two_texts(raw["query"]) and _are_two_texts(raw["pos"]):
        notes.append("'pos' of two strings is read as two passages, not as [instruction, text]")
    num_negatives = 1 if _has_flat_pairs(raw) and raw.get("neg") else len(raw.get("neg") or ())
    if len(canonical["neg"]) < num_negatives:
        notes.append("a negative that is also a positive is left out")
    return notes


def notes_on_chat(raw: dict[str, Any], canonical: dict[str, Any]) -> list[str]:
    """Returns what `canonical_chat` did to a line that its author may not expect."""
    notes = []
    if raw.get("messages") and raw.get("text"):
        notes.append("'messages' is read, and 'text' beside it is not")
    if len(canonical["text"]) % 2:
        notes.append("the last user message has no answer and is left out")
    return notes


def chat_form(canonical: dict[str, Any]) -> str:
    """Returns whether a line is one of "chats" or "plain texts"."""
    return "plain texts" if canonical["text"][:1] == [NO_PROMPT] else "chats"


def tulu2(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Skips the lines of Tulu 2 in which the assistant calls itself Tulu."""
    return None if raw.get("dataset") == "hard_coded" else raw


def tulu3(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Skips the lines of Tulu 3 in which the assistant calls itself Tulu."""
    return None if "hard_coded" in str(raw.get("source")) else raw
