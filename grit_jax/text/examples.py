"""Examples as a prepared dataset holds them: token ids, and which of them count.

An embedding example has a query, its positives and its negatives; a chat example is one
conversation. Both are read from text in the original's two formats, cut to a length, and written
as bytes.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import msgpack
import numpy as np

from grit_jax.text.templates import chat_prompt, embedding_prefix
from grit_jax.text.tokenizer import Tokenizer


class RejectedExample(ValueError):
    """An example that cannot be trained on; its message is the reason."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids of one text, and which of them count (to be pooled, or to be learned)."""

    tokens: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class EmbeddingExample:
    """A query, the passages that answer it (at least one), and some that do not (maybe none)."""

    query: Text
    positives: list[Text]
    negatives: list[Text]

    @property
    def texts(self) -> list[Text]:
        """All its texts, in the order in which a dataset stores their lengths."""
        return [self.query, *self.positives, *self.negatives]


@dataclasses.dataclass(frozen=True)
class ChatExample:
    """A conversation, of which the assistant's words are to be learned."""

    chat: Text

    @property
    def texts(self) -> list[Text]:
        """All its texts, in the order in which a dataset stores their lengths."""
        return [self.chat]


CHAT_LABELS = ("corrected", "original")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts become token ids. The defaults are those of GritLM, but for the labels.

    Attributes:
      query_length: longest query in tokens; what is longer is cut, as with the others.
      passage_length: longest passage.
      chat_length: longest chat.
      chat_labels: "corrected", or "original" for those of the original (see `chat_text`).
    """

    query_length: int = 256
    passage_length: int = 2048
    chat_length: int = 2048
    chat_labels: str = "corrected"


def embedding_text(tokenizer: Tokenizer, instruction: str, text: str, max_length: int) -> Text:
    """Returns `<s>`, the instruction and the text, cut to `max_length` tokens.

    The mask leaves out `<s>` and the instruction: they are attended to, and not pooled. A token
    with characters of both belongs to the text.

    Raises:
      RejectedExample: the text is empty, or without a token, or the instruction alone is over the
        length.
    """
    if not text.strip():
        raise RejectedExample("empty text")
    prefix, prefix_ids = _prefix_and_ids(tokenizer, instruction)
    if 1 + len(prefix_ids) >= max_length:
        raise RejectedExample("instruction alone is over the length")
    ids, num_before = tokenizer.ids_after(prefix, prefix_ids, text)
    if num_before == len(ids):  # A tokenizer may drop characters, such as those of no width.
        raise RejectedExample("empty text")
    tokens = np.empty(min(1 + len(ids), max_length), np.int32)
    tokens[0], tokens[1:] = tokenizer.bos_id, ids[: max_length - 1]
    mask = np.empty(len(tokens), bool)
    mask[: 1 + num_before], mask[1 + num_before :] = False, True
    return Text(tokens, mask)


@functools.lru_cache(maxsize=1024)
def _prefix_and_ids(tokenizer: Tokenizer, instruction: str) -> tuple[str, np.ndarray]:
    """Returns what stands before a text, and its ids; instructions are few."""
    prefix = embedding_prefix(instruction)
    return prefix, tokenizer.ids(prefix)


# In the place of a user's words: the text that follows answers nobody.
NO_PROMPT = ""


def plain_text(tokenizer: Tokenizer, text: str, max_length: int) -> Text:
    """Returns `<s>`, the text and `</s>`, cut to `max_length` tokens; all but `<s>` is learned.

    Raises:
      RejectedExample: the text is empty.
    """
    if not text.strip():
        raise RejectedExample("empty text")
    parts = [[tokenizer.bos_id], tokenizer.ids(text), [tokenizer.eos_id]]
    tokens = np.concatenate(parts, dtype=np.int32)[:max_length]
    return Text(tokens, np.arange(len(tokens)) > 0)


def chat_text(
    tokenizer: Tokenizer, turns: Sequence[str], max_length: int, labels: str = "corrected"
) -> Text:
    """Returns a conversation, user first and turn about, cut to `max_length` tokens.

    The mask holds the assistant's words and the `</s>` after each. The labels "original" are those
    of the original, which does not count the line break between turns: from the second turn on
    they are off by two tokens a turn.

    Raises:
      RejectedExample: no user's turn is followed by an answer, a turn is empty, or the first
        prompt alone is over the length.
    """
    if len(turns) < 2:
        raise RejectedExample("a chat without an answer")
    if not all(turn.strip() for turn in turns):
        raise RejectedExample("empty turn")
    bos, eos = (np.array([token], np.int32) for token in (tokenizer.bos_id, tokenizer.eos_id))
    ids, prompts, place = [bos], [slice(0, 1)], 1
    for first in range(0, len(turns) - 1, 2):
        prompt = chat_prompt(turns[first], is_first=first == 0)
        answer = turns[first + 1].strip()
        turn_ids, num_before = tokenizer.ids_after(prompt, tokenizer.ids(prompt), answer)
        counted = num_before
        if labels == "original":
            counted = len(tokenizer.ids(chat_prompt(turns[first], is_first=True)))
        ids += [turn_ids, eos]
        prompts.append(slice(place, place + counted))
        place += counted + len(turn_ids) - num_before + 1
    tokens = np.concatenate(ids)
    mask = np.ones(len(tokens), bool)
    for span in prompts:
        mask[span] = False
    if not any(mask[:max_length]):
        raise RejectedExample("prompt alone is over the length")
    return Text(tokens[:max_length], mask[:max_length])


def embedding_example(
    tokenizer: Tokenizer, raw: dict[str, Any], options: TextOptions
) -> EmbeddingExample:
    """Returns the example of `{"query": [instruction, text], "pos": [[...]], "neg": [[...]]}`.

    Raises:
      RejectedExample: see `embedding_text`; or there is no positive.
    """
    if not len(raw["pos"]):
        raise RejectedExample("no positive")

    def passages(pairs: Sequence[Sequence[str]]) -> list[Text]:
        return [
            embedding_text(tokenizer, instruction, text, options.passage_length)
            for instruction, text in pairs
        ]

    instruction, text = raw["query"]
    return EmbeddingExample(
        query=embedding_text(tokenizer, instruction, text, options.query_length),
        positives=passages(raw["pos"]),
        negatives=passages(raw["neg"]),
    )


def chat_example(tokenizer: Tokenizer, raw: dict[str, Any], options: TextOptions) -> ChatExample:
    """Returns the example of `{"text": [user, assistant, ...]}`.

    With `NO_PROMPT` in the place of the user's words it is plain text.

    Raises:
      RejectedExample: see `chat_text` and `plain_text`.
    """
    if len(raw["text"]) == 2 and raw["text"][0] == NO_PROMPT:
        return ChatExample(plain_text(tokenizer, raw["text"][1], options.chat_length))
    return ChatExample(chat_text(tokenizer, raw["text"], options.chat_length, options.chat_labels))


EXAMPLE_MAKERS = {"embedding": embedding_example, "generative": chat_example}


def to_bytes(example: EmbeddingExample | ChatExample) -> bytes:
    """Returns the example as a record: msgpack, two bytes a token where they suffice."""
    texts = example.texts
    tokens = np.concatenate([text.tokens for text in texts])
    width = 2 if tokens.max() < 2**16 else 4
    record = {
        "tokens": tokens.astype(f"<u{width}").tobytes(),
        "mask": np.packbits(np.concatenate([text.mask for text in texts])).tobytes(),
        "lengths": [len(text) for text in texts],
    }
    if isinstance(example, EmbeddingExample):
        record["num_positives"] = len(example.positives)
    return msgpack.Packer().pack(record)


def from_bytes(record_bytes: bytes) -> EmbeddingExample | ChatExample:
    """Returns the example of a record made by `to_bytes`."""
    record = msgpack.unpackb(record_bytes)
    lengths = record["lengths"]
    width = len(record["tokens"]) // sum(lengths)
    tokens = np.frombuffer(record["tokens"], f"<u{width}").astype(np.int32)
    mask = np.unpackbits(np.frombuffer(record["mask"], np.uint8), count=len(tokens)).astype(bool)
    ends = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(tokens, ends), np.split(mask, ends), strict=True)
    texts = [Text(*piece) for piece in pieces]
    if "num_positives" not in record:
        return ChatExample(texts[0])
    first_negative = 1 + record["num_positives"]
    return EmbeddingExample(texts[0], texts[1:first_negative], texts[first_negative:])
