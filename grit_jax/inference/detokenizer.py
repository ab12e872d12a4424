"""Token ids as they come, one after the other, to text that can be shown at once."""

from collections.abc import Sequence

from grit_jax.text.tokenizer import Tokenizer

# What a character is shown as whose bytes have not all come.
INCOMPLETE = "\ufffd"
# A piece that the tokens are put behind, because SentencePiece drops the space before a first word.
# Behind it, byte-level tokens stand for the same bytes as anywhere.
BEFORE = "a"


class IncrementalDetokenizer:
    """The text of one answer.

    Args:
      tokenizer: of the model.
      stop: strings before which the text ends.

    Attributes:
      text: what has been returned so far.
      is_stopped: whether a stop string has come; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._before = tokenizer.encode(BEFORE)
        self._length_before = len(tokenizer.decode(self._before))  # Some put a space before it.
        self._ids: list[int] = []  # Of a character whose bytes have not all come.
        self._held = ""  # What may be the beginning of a stop string.
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Returns the text that is certain after a next token, maybe none."""
        self._ids.append(token)
        text = self._text_of_ids()
        return "" if text.endswith(INCOMPLETE) else self._take(text)

    def finish(self) -> str:
        """Returns what was held back; no token comes after."""
        piece = self._take(self._text_of_ids())
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _text_of_ids(self) -> str:
        return self._tokenizer.decode([*self._before, *self._ids])[self._length_before :]

    def _take(self, text: str) -> str:
        self._ids = []
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [text.find(stop) for stop in self._stop if stop in text]
        self.is_stopped = bool(found)
        kept = min(found) if found else len(text) - self._length_held(text)
        self._held = "" if found else text[kept:]
        self.text += text[:kept]
        return text[:kept]

    def _length_held(self, text: str) -> int:
        """Returns the length of the longest end of a text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
