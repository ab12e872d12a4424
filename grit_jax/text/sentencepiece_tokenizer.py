"""Text to token ids with SentencePiece, the reference for Mistral's tokenizer."""

from collections.abc import Callable
import functools
import re

from jaxtyping import Int
import numpy as np
import sentencepiece

# How SentencePiece writes a space.
SPACE = "\u2581"
# Spaces, and the word that they stand before.
WORDS = re.compile(" *[^ ]+| +")
# Texts in which a tokenizer shows whether it takes words one by one.
SPACED = ("a b", " a", "a ", "a  b", "\na\n b \n\n", "a\tb\r\nc", "", " ", "\n", "日本 🙂\nü")


class _Cache(dict):
    """The ids of words as bytes, made when they are first asked for."""

    MAX_WORDS, MAX_LENGTH = 250_000, 32

    def __init__(self, make: Callable[[str], bytes]):
        super().__init__()
        self._make = make

    def __missing__(self, word: str) -> bytes:
        ids = self._make(word)
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
      model: the content of its file.

    Raises:
      ValueError: it is none, or has no token that begins or ends a text.
    """

    def __init__(self, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("it is no SentencePiece model") from None
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        for token, verb in ((self.bos_id, "begins"), (self.eos_id, "ends")):
            if token < 0:  # T5's has nothing that begins a text.
                raise ValueError(f"it has no token that {verb} a text: take another tokenizer")

    def special_tokens(self) -> dict[str, str]:
        """Returns what begins and ends a text and stands for the unknown, as transformers says."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self._processor.unk_id()}
        return {f"{name}_token": self._processor.id_to_piece(i) for name, i in ids.items()}

    def exported(self) -> bytes:
        """Returns the model, with which transformers puts `<s>` before each text by itself."""
        return self._model

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without `<s>` and `</s>`."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`; special and unknown ids leave no trace."""
        return self._processor.decode([number for number in ids if number < self.vocab_size])

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode`, sooner: most words have been seen before."""
        if not self._words_stand_apart:
            return np.array(self.encode(text), np.int32)
        if not text:
            return np.zeros(0, np.int32)
        first, *others = text.split("\n")
        lines = [self._first_line(first), *map(self._line, others)]
        return np.frombuffer(self._line_break.join(lines), np.int32)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `prefix + text`, given those of `prefix`."""
        if not self._words_stand_apart or not prefix.endswith("\n"):
            return self.ids(prefix + text)
        lines = self._line_break.join(map(self._line, text.split("\n")))
        return np.concatenate([prefix_ids, np.frombuffer(lines, np.int32)])

    def _first_line(self, line: str) -> bytes:
        """Returns the ids of a text's first line, before which SentencePiece puts a space."""
        if SPACE in line:
            return _to_bytes(self.encode(line))
        return self._words(f" {line}")

    def _line(self, line: str) -> bytes:
        """Returns the ids of a line that is not the first."""
        end = line.find(" ")
        if end < 0 or SPACE in line:
            return self._first_word_ids[line]
        return self._first_word_ids[line[:end]] + self._words(line[end:])

    def _words(self, words: str) -> bytes:
        """Returns the ids of words, each with one or more spaces before it."""
        if "  " in words:
            return b"".join(self._word_ids[word[1:]] for word in WORDS.findall(words))
        return b"".join(map(self._word_ids.__getitem__, words[1:].split(" ")))

    @functools.cached_property
    def _word_ids(self) -> "_Cache":
        space = _to_bytes([self._processor.piece_to_id(SPACE)])
        return _Cache(lambda word: _to_bytes(self.encode(word)) if word else space)

    @functools.cached_property
    def _first_word_ids(self) -> "_Cache":
        before = len(self.encode("\n"))
        return _Cache(lambda word: _to_bytes(self.encode(f"\n{word}")[before:]))

    @functools.cached_property
    def _line_break(self) -> bytes:
        return _to_bytes(self.encode("a\n")[len(self.encode("a")) :])

    @functools.cached_property
    def _words_stand_apart(self) -> bool:
        """Whether a text's ids are those of its words: no piece goes beyond a word or a line."""
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        if any("\n" in piece or SPACE in piece.lstrip(SPACE) for piece in pieces):
            return False
        # Some tokenizers also change or drop spaces and line breaks.
        self.__dict__["_words_stand_apart"] = True
        return all(self.ids(text).tolist() == self.encode(text) for text in SPACED)
