"""Reads a long JSON document value by value, without holding all of it."""

import codecs
import json
from typing import Any

# At least so many bytes are read at a time.
MIN_CHUNK_BYTES = 2**16


class JsonError(ValueError):
    """The document is not valid JSON, or a value is too long; the message says where."""


class JsonStream:
    """The tokens and values of a JSON document.

    Invalid UTF-8 becomes half surrogates, as with `errors="surrogateescape"`.

    Args:
      stream: the bytes of the document.
      chunk_bytes: bytes to read at a time.
      max_value: maximum characters of a value.
    """

    def __init__(self, stream: Any, chunk_bytes: int, max_value: int):
        self._stream, self._max_value = stream, max_value
        self._chunk_bytes = max(chunk_bytes, MIN_CHUNK_BYTES)
        self._decode_bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decode_value = json.JSONDecoder().raw_decode
        self._text, self._position, self._is_at_end = "", 0, False

    def peek(self) -> str:
        """Returns the next character that is not white space, "" at the end."""
        while True:
            while self._position < len(self._text):
                character = self._text[self._position]
                if character not in " \t\r\n\ufeff":
                    return character
                self._position += 1
            if self._is_at_end:
                return ""
            self._read()

    def skip(self, character: str) -> bool:
        """Returns whether `character` is next, and skips it if so."""
        if self.peek() != character:
            return False
        self._position += 1
        return True

    def value(self) -> tuple[Any, str]:
        """Returns the next value, and its source text.

        Raises:
          JsonError: it is not valid JSON, incomplete or too long.
        """
        if not self.peek():
            raise JsonError("the file ends too early")
        while True:
            start = self._position
            try:
                value, end = self._decode_value(self._text, start)
            except RecursionError:
                raise JsonError("a value is nested too deeply") from None
            except ValueError as error:
                if self._is_at_end:
                    raise JsonError(f"broken JSON, or the file ends too early ({error})") from None
                if len(self._text) - start > self._max_value:
                    raise JsonError(
                        f"broken JSON, or a value of over {self._max_value:,} characters"
                    ) from None
            else:
                # A number at the end of the text may continue.
                if end < len(self._text) or self._is_at_end:
                    self._position = end
                    return value, self._text[start:end]
            self._read()

    def _read(self) -> None:
        content = self._stream.read(self._chunk_bytes)
        self._is_at_end = not content
        self._text = self._text[self._position :] + self._decode_bytes(content, not content)
        self._position = 0
