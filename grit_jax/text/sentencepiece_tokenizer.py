"""Tokenizer of a SentencePiece model, such as Mistral's.

If no piece spans a word boundary, a text is encoded word by word with a cache of the words' ids,
which gives the same ids as encoding it whole and is faster on text with repeated words.
"""

from collections.abc import Callable, Sequence
import functools
import re

from jaxtyping import Int
import numpy as np
import sentencepiece

from grit_jax.text.hugging_face_tokenizer import HuggingFaceTokenizer
from grit_jax.text.sentencepiece_conversion import SPACE, convert_sentencepiece

# A word with the spaces before it.
WORDS = re.compile(" *[^ ]+| +")
# Texts that test whether a model can be applied word by word.
SPACED = ("a b", " a", "a ", "a  b", "\na\n b \n\n", "a\tb\r\nc", "", " ", "\n", "日本 🙂\nü")


class _WordCache(dict):
    """The ids of words as bytes, computed on first use."""

    MAX_WORDS, MAX_LENGTH = 250_000, 32

    def __init__(self, encode: Callable[[str], bytes]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= self.MAX_LENGTH:
            if len(self) >= self.MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _to_bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
      model: content of the model file.

    Raises:
      ValueError: the model is invalid.
    """

    def __init__(self, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(
                "not a SentencePiece model: use the model's tokenizer.json if it is of another "
                "kind, as Llama 3's is"
            ) from None
        self.content = model
        self.vocab_size: int = self._processor.vocab_size()
        ids = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id()}
        ids["unk"] = self._processor.unk_id()
        # Their names in transformers. T5 has no BOS token.
        self.special_tokens = {
            f"{name}_token": self._processor.id_to_piece(i) for name, i in ids.items() if i >= 0
        }

    @property
    def last_id(self) -> int:
        """The largest id that a text may have."""
        return self.vocab_size - 1

    last_base_id = last_id

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token, or None if there is no such token."""
        token_id = self._processor.piece_to_id(token)
        return token_id if self.token(token_id) == token else None

    def token(self, token_id: int | None) -> str | None:
        """Returns the token with an id, or None if there is none."""
        if token_id is None or not 0 <= token_id < self.vocab_size:
            return None
        return self._processor.id_to_piece(token_id)

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """The special tokens, which no text becomes, with their ids."""
        processor = self._processor
        ids = range(self.vocab_size)
        special = (i for i in ids if processor.is_control(i) or processor.is_unknown(i))
        return {processor.id_to_piece(i): i for i in special}

    def exported(self, begin: Sequence[str], end: Sequence[str]) -> bytes:
        """Returns a tokenizer.json that puts these tokens before and after each text.

        Raises:
          ValueError: no tokenizer.json has the same ids.
        """
        converted = convert_sentencepiece(self.content).to_str().encode()
        return HuggingFaceTokenizer(converted).exported(begin, end)

    def encode_markup(self, text: str) -> list[int]:
        """Returns the ids of `text`, in which special tokens are tokens."""
        ids: list[int] = []
        for part in self._markup.split(text):
            control = self.control_tokens.get(part)
            ids += self.encode(part) if control is None else [control]
        return ids

    @functools.cached_property
    def _markup(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.control_tokens))})")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end token."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, skipping special and unknown ids."""
        return self._processor.decode([token_id for token_id in ids if token_id < self.vocab_size])

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode` as an array."""
        if not self._is_word_by_word:
            return np.array(self.encode(text), np.int32)
        if not text:
            return np.zeros(0, np.int32)
        first, *others = text.split("\n")
        lines = [self._first_line(first), *map(self._line, others)]
        return np.frombuffer(self._line_break.join(lines), np.int32)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `prefix + text`, given the ids of `prefix`."""
        if not self._is_word_by_word or not prefix.endswith("\n"):
            return self.ids(prefix + text)
        lines = self._line_break.join(map(self._line, text.split("\n")))
        return np.concatenate([prefix_ids, np.frombuffer(lines, np.int32)])

    def _first_line(self, line: str) -> bytes:
        """Returns the ids of a text's first line; SentencePiece inserts a space before it."""
        if SPACE in line:
            return _to_bytes(self.encode(line))
        return self._words(f" {line}")

    def _line(self, line: str) -> bytes:
        """Returns the ids of a line after a line break."""
        end = line.find(" ")
        if end < 0 or SPACE in line:
            return self._first_word_ids[line]
        return self._first_word_ids[line[:end]] + self._words(line[end:])

    def _words(self, words: str) -> bytes:
        """Returns the ids of words, each after one or more spaces."""
        if "  " in words:
            return b"".join(self._word_ids[word[1:]] for word in WORDS.findall(words))
        return b"".join(map(self._word_ids.__getitem__, words[1:].split(" ")))

    @functools.cached_property
    def _word_ids(self) -> _WordCache:
        space = _to_bytes([self._processor.piece_to_id(SPACE)])
        return _WordCache(lambda word: _to_bytes(self.encode(word)) if word else space)

    @functools.cached_property
    def _first_word_ids(self) -> _WordCache:
        num_before = len(self.encode("\n"))
        return _WordCache(lambda word: _to_bytes(self.encode(f"\n{word}")[num_before:]))

    @functools.cached_property
    def _line_break(self) -> bytes:
        return _to_bytes(self.encode("a\n")[len(self.encode("a")) :])

    @functools.cached_property
    def _is_word_by_word(self) -> bool:
        """Whether the ids of a text are those of its words, one after the other."""
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        if any("\n" in piece or SPACE in piece.lstrip(SPACE) for piece in pieces):
            return False
        # Some models also change or drop spaces and line breaks.
        self.__dict__["_is_word_by_word"] = True
        return all(self.ids(text).tolist() == self.encode(text) for text in SPACED)
