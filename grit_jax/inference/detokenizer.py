"""Decodes token ids one at a time, for streaming."""

from collections.abc import Sequence

from grit_jax.text.tokenizer import Tokenizer

# Tokenizers decode the incomplete bytes of a character to the replacement character, U+FFFD.
INCOMPLETE = "\ufffd"
# Tokens are decoded after this text, because SentencePiece drops the space before a first word.
# Byte-level tokens decode to the same bytes after it.
CONTEXT = "a"


class IncrementalDetokenizer:
    """Decodes the tokens of one result.

    Args:
      tokenizer: the model's tokenizer.
      stop: strings at which the text ends.

    Attributes:
      text: the text returned so far.
      is_stopped: whether a stop string has been generated; no text follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._context = tokenizer.encode(CONTEXT)
        # Some tokenizers decode it with a space in front.
        self._context_length = len(tokenizer.decode(self._context))
        self._ids: list[int] = []  # Tokens of a character whose bytes are not complete.
        self._held = ""  # Text that may be the beginning of a stop string.
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Returns the text that the next token completes, possibly none."""
        self._ids.append(token)
        text = self._decode_ids()
        return "" if text.endswith(INCOMPLETE) else self._release(text)

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        released = self._release(self._decode_ids())
        rest, self._held = self._held, ""
        self.text += rest
        return released + rest

    def _decode_ids(self) -> str:
        return self._tokenizer.decode([*self._context, *self._ids])[self._context_length :]

    def _release(self, text: str) -> str:
        """Returns the text up to a stop string, or up to a possible beginning of one."""
        self._ids = []
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [text.find(stop) for stop in self._stop if stop in text]
        self.is_stopped = bool(found)
        end = min(found) if found else len(text) - self._held_length(text)
        self._held = "" if found else text[end:]
        self.text += text[:end]
        return text[:end]

    def _held_length(self, text: str) -> int:
        """Returns the length of the longest suffix of a text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
