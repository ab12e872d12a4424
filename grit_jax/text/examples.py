"""Tokenized examples: token ids, the mask of pooled or predicted tokens, and stored bytes.

An embedding example is a query with its positives and negatives; a chat example is one
conversation. By default both use the text formats of GritLM (see `templates`).
"""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from jaxtyping import Bool, Int
import msgpack
import numpy as np

from grit_jax.text.chat_template import chat_template
from grit_jax.text.templates import (
    GRIT,
    ROLES,
    ChatError,
    chat_prompt,
    embedding_prefix,
    strip_instruction,
)
from grit_jax.text.tokenizer import Tokenizer


class RejectedExample(ValueError):
    """An example that cannot be trained on.

    Attributes:
      details: what differs between examples with the same reason: "tokens", the number of tokens of
        what is too long, and "limit", how many it may have.
    """

    def __init__(self, reason: str, **details: int):
        super().__init__(reason)
        self.details = details


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenized text.

    Attributes:
      tokens: token ids.
      mask: the tokens that are pooled (embedding) or predicted (chat).
      num_cut: number of tokens beyond the maximum length, which were cut. Not stored.
      instruction: the stripped instruction of a text to embed, None for a chat. Not stored.
      note: what is to be said about how it was made; "" for nothing. Not stored.
    """

    tokens: Int[np.ndarray, " tokens"]
    mask: Bool[np.ndarray, " tokens"]
    num_cut: int = 0
    instruction: str | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


class Example(abc.ABC):
    """A tokenized example of any kind: its texts, and how it is stored."""

    @property
    @abc.abstractmethod
    def texts(self) -> list[Text]:
        """All texts, in the order in which the prepared data stores them."""

    @classmethod
    @abc.abstractmethod
    def from_texts(cls, texts: list[Text], fields: Mapping[str, Any]) -> "Example":
        """Returns the example of these `texts` and `fields`."""

    @property
    def num_positives(self) -> int:
        """Number of texts after the first that are positives."""
        return 0

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are stored in addition to the texts, as values for msgpack."""
        return {}

    def to_bytes(self) -> bytes:
        """Returns the example as a msgpack record, with two bytes per token if ids allow it."""
        tokens = np.concatenate([text.tokens for text in self.texts])
        width = 2 if tokens.max() < 2**16 else 4
        record = {
            "tokens": tokens.astype(f"<u{width}").tobytes(),
            "mask": np.packbits(np.concatenate([text.mask for text in self.texts])).tobytes(),
            "lengths": [len(text) for text in self.texts],
        }
        return msgpack.Packer().pack(record | self.fields)

    @classmethod
    def from_bytes(cls, record_bytes: bytes) -> "Example":
        """Returns the example of a record made by `to_bytes`."""
        record = msgpack.unpackb(record_bytes)
        lengths = record["lengths"]
        width = len(record["tokens"]) // sum(lengths)
        tokens = np.frombuffer(record["tokens"], f"<u{width}").astype(np.int32)
        mask = np.unpackbits(np.frombuffer(record["mask"], np.uint8), count=len(tokens))
        ends = np.cumsum(lengths)[:-1]
        pieces = zip(np.split(tokens, ends), np.split(mask.astype(bool), ends), strict=True)
        return cls.from_texts([Text(*piece) for piece in pieces], record)


@dataclasses.dataclass(frozen=True)
class EmbeddingExample(Example):
    """A query, its positive passages (at least one), and its negative passages (maybe none)."""

    query: Text
    positives: list[Text]
    negatives: list[Text]

    @property
    def texts(self) -> list[Text]:
        """The query, the positives and the negatives."""
        return [self.query, *self.positives, *self.negatives]

    @classmethod
    def from_texts(cls, texts: list[Text], fields: Mapping[str, Any]) -> "EmbeddingExample":
        """Returns the example of a query, `fields["num_positives"]` positives, and negatives."""
        first_negative = 1 + fields["num_positives"]
        return cls(texts[0], texts[1:first_negative], texts[first_negative:])

    @property
    def num_positives(self) -> int:
        """Number of positive passages."""
        return len(self.positives)

    @property
    def fields(self) -> dict[str, Any]:
        """The number of positives, which separates them from the negatives."""
        return {"num_positives": self.num_positives}


@dataclasses.dataclass(frozen=True)
class ChatExample(Example):
    """A conversation, or plain text."""

    chat: Text

    @property
    def texts(self) -> list[Text]:
        """The conversation."""
        return [self.chat]

    @classmethod
    def from_texts(cls, texts: list[Text], fields: Mapping[str, Any]) -> "ChatExample":
        """Returns the example of one text."""
        del fields
        return cls(texts[0])


CHAT_LABELS = ("corrected", "original")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts are tokenized. The defaults are GritLM's, except for `chat_labels`.

    Attributes:
      query_length: maximum tokens per query; longer queries are cut.
      passage_length: maximum tokens per passage.
      chat_length: maximum tokens per chat.
      chat_labels: "corrected", or "original" for the masks of the original code (see `chat_text`).
      chat_template: the template of chats, in Jinja; "" is GRIT's.
      embedding_template: the template of texts to embed (see `templates.embedding_template`).
    """

    query_length: int = 256
    passage_length: int = 2048
    chat_length: int = 2048
    chat_labels: str = "corrected"
    chat_template: str = ""
    embedding_template: str = GRIT


def embedding_text(
    tokenizer: Tokenizer, instruction: str, text: str, max_length: int, template: str = GRIT
) -> Text:
    """Returns the tokens of an instruction and a text, with those that begin and end a text.

    A longer text is cut to `max_length`, before the tokens that end it, as transformers does. The
    mask excludes what precedes the text, `<s>` included: it is attended to, but not pooled. A token
    that spans the boundary counts as text. Without a prompt, all tokens are pooled.

    Raises:
      RejectedExample: the text is empty or has no tokens, or the instruction alone is too long.
    """
    if not text.strip():
        raise RejectedExample("empty text")
    prefix, prefix_ids = _prefix_and_ids(tokenizer, instruction, template)
    begin, end = tokenizer.begin_ids, tokenizer.end_ids
    num_added = len(begin) + len(prefix_ids) + len(end)
    if num_added >= max_length:
        raise RejectedExample(
            "instruction alone is too long", tokens=num_added, limit=max_length - 1
        )
    ids, num_before = tokenizer.ids_after(prefix, prefix_ids, text)
    if num_before == len(ids):  # A tokenizer may drop characters, e.g. zero-width ones.
        raise RejectedExample("empty text")
    kept = ids[: max_length - len(begin) - len(end)]
    tokens = np.concatenate([begin, kept, end], dtype=np.int32)
    mask = np.arange(len(tokens)) >= (len(begin) + num_before if prefix else 0)
    return Text(tokens, mask, len(ids) - len(kept), strip_instruction(instruction, template))


@functools.lru_cache(maxsize=1024)
def _prefix_and_ids(
    tokenizer: Tokenizer, instruction: str, template: str
) -> tuple[str, np.ndarray]:
    """Returns the prefix of a text and its ids, cached because instructions are few."""
    prefix = embedding_prefix(instruction, template)
    return prefix, tokenizer.ids(prefix)


# Stands for the user's turn before plain text, which has no prompt.
NO_PROMPT = ""


def plain_text(tokenizer: Tokenizer, text: str, max_length: int) -> Text:
    """Returns the tokens of a text and `</s>`, cut to `max_length`, after those that begin texts.

    The mask excludes the first token, usually `<s>`: nothing precedes it to predict it from.

    Raises:
      RejectedExample: the text is empty.
    """
    if not text.strip():
        raise RejectedExample("empty text")
    begin = tokenizer.begin_ids
    tokens = np.concatenate([begin, tokenizer.ids(text), [tokenizer.eos_id]], dtype=np.int32)
    return _cut(tokens, np.arange(len(tokens)) >= max(len(begin), 1), max_length)


def _cut(
    tokens: Int[np.ndarray, " tokens"], mask: Bool[np.ndarray, " tokens"], max_length: int
) -> Text:
    return Text(tokens[:max_length], mask[:max_length], max(0, len(tokens) - max_length))


def chat_text(
    tokenizer: Tokenizer, turns: Sequence[str], max_length: int, labels: str = "corrected"
) -> Text:
    """Returns the tokens of a conversation, cut to `max_length`.

    The mask selects the assistant's turns and the `</s>` after each.

    Args:
      tokenizer: text to ids.
      turns: alternating turns, the user's first.
      max_length: maximum number of tokens.
      labels: "corrected", or "original" for the masks of GritLM's code, which does not count the
        line break between turns: from the second turn on, they are off by two tokens per turn.

    Raises:
      RejectedExample: there is no answer, a turn is empty, or the first prompt alone is too long.
    """
    if len(turns) < 2:
        raise RejectedExample("a chat without an answer")
    if not all(turn.strip() for turn in turns):
        raise RejectedExample("empty turn")
    begin, eos = tokenizer.begin_ids, np.array([tokenizer.eos_id], np.int32)
    ids, prompts, position = [begin], [slice(0, len(begin))], len(begin)
    for first in range(0, len(turns) - 1, 2):
        prompt = chat_prompt(turns[first], is_first=first == 0)
        answer = turns[first + 1].strip()
        turn_ids, num_before = tokenizer.ids_after(prompt, tokenizer.ids(prompt), answer)
        masked = num_before
        if labels == "original":
            masked = len(tokenizer.ids(chat_prompt(turns[first], is_first=True)))
        ids += [turn_ids, eos]
        prompts.append(slice(position, position + masked))
        position += masked + len(turn_ids) - num_before + 1
    tokens = np.concatenate(ids)
    mask = np.ones(len(tokens), bool)
    for span in prompts:
        mask[span] = False
    if not any(mask[:max_length]):
        raise RejectedExample(
            "prompt alone is too long", tokens=int(mask.argmax()), limit=max_length - 1
        )
    return _cut(tokens, mask, max_length)


def chat_in_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], max_length: int, template: str
) -> Text:
    """Returns the tokens of a chat in a chat template, cut to `max_length`.

    The mask selects the assistant's answers and the tokens that end them (see
    `ChatTemplate.example`). Messages after the last answer are left out.

    Args:
      tokenizer: text to ids.
      messages: messages of the user and the assistant, perhaps with messages of the system.
      max_length: maximum number of tokens.
      template: the template, in Jinja.

    Raises:
      RejectedExample: there is no answer, a message is empty, the template refuses the chat, or the
        first prompt alone is too long.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RejectedExample("a chat without an answer")
    messages = messages[: answers[-1] + 1]
    if not all(each["content"].strip() for each in messages if each["role"] != "system"):
        raise RejectedExample("empty turn")
    try:
        chat = chat_template(template, tokenizer).example(messages)
    except ChatError as error:
        raise RejectedExample(str(error)) from None
    if not any(chat.mask[:max_length]):
        raise RejectedExample(
            "prompt alone is too long", tokens=int(chat.mask.argmax()), limit=max_length - 1
        )
    text = _cut(chat.tokens, chat.mask, max_length)
    return dataclasses.replace(text, note=REWRITTEN) if chat.num_rewritten else text


# Note on a chat.
REWRITTEN = "the chat template rewrites earlier answers, which are not trained on"


def embedding_example(
    tokenizer: Tokenizer, raw: dict[str, Any], options: TextOptions
) -> EmbeddingExample:
    """Tokenizes `{"query": [instruction, text], "pos": [[instruction, text], ...], "neg": [...]}`.

    Raises:
      RejectedExample: there is no positive, or a text is rejected by `embedding_text`.
    """
    if not len(raw["pos"]):
        raise RejectedExample("no positive")

    template = options.embedding_template

    def passages(pairs: Sequence[Sequence[str]]) -> list[Text]:
        return [
            embedding_text(tokenizer, instruction, text, options.passage_length, template)
            for instruction, text in pairs
        ]

    instruction, text = raw["query"]
    return EmbeddingExample(
        query=embedding_text(tokenizer, instruction, text, options.query_length, template),
        positives=passages(raw["pos"]),
        negatives=passages(raw["neg"]),
    )


def chat_example(tokenizer: Tokenizer, raw: dict[str, Any], options: TextOptions) -> ChatExample:
    """Tokenizes `{"text": [user, assistant, ...]}`, or plain text as `{"text": [NO_PROMPT, text]}`.

    For a chat template, the messages are in "messages" if the chat has other ones than its turns.

    Raises:
      RejectedExample: see `chat_text`, `chat_in_template` and `plain_text`.
    """
    if len(raw["text"]) == 2 and raw["text"][0] == NO_PROMPT:
        return ChatExample(plain_text(tokenizer, raw["text"][1], options.chat_length))
    length = options.chat_length
    if not options.chat_template:
        return ChatExample(chat_text(tokenizer, raw["text"], length, options.chat_labels))
    turns = [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(raw["text"])]
    messages = raw.get("messages", turns)
    return ChatExample(chat_in_template(tokenizer, messages, length, options.chat_template))
