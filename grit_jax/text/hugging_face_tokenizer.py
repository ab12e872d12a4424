"""Tokenizer of a Hugging Face `tokenizer.json`."""

from collections.abc import Iterator
import json
from pathlib import Path
from typing import Any

from jaxtyping import Int
import numpy as np
import tokenizers

# Files next to tokenizer.json that name the begin and end token, by content or by id.
BY_CONTENT, BY_ID = ("tokenizer_config.json", "special_tokens_map.json"), "config.json"


class HuggingFaceTokenizer:
    """A tokenizer of the package `tokenizers`.

    Args:
      path: path of a `tokenizer.json`.

    Raises:
      ValueError: the file is not a tokenizer, or no file next to it names its begin or end token.
    """

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises plain Exceptions.
            raise ValueError(f"not a valid tokenizer.json: {error}") from None
        # Special tokens are added as ids. In a text, "</s>" is four characters.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._begin = self._special_token(path.parent, "bos_token")
        self._end = self._special_token(path.parent, "eos_token")
        self.bos_id: int = vocabulary[self._begin]
        self.eos_id: int = vocabulary[self._end]

    def special_tokens(self) -> dict[str, str]:
        """Returns the begin and end token by their names in transformers."""
        return {"bos_token": self._begin, "eos_token": self._end}

    def exported(self) -> bytes:
        """Returns the content of a tokenizer.json that prepends the begin token to each text."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        begin = self._begin
        copy.post_processor = tokenizers.processors.TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", f"{begin}:1", "$B:1"],
            special_tokens=[(begin, self.bos_id)],
        )
        return copy.to_str(pretty=True).encode()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, skipping special ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode` as an array."""
        return np.array(self.encode(text), np.int32)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `prefix + text`."""
        del prefix_ids  # A token may span the boundary.
        return self.ids(prefix + text)

    def _special_token(self, folder: Path, name: str) -> str:
        for token in self._named_tokens(folder, name):
            if token is not None and self._tokenizer.token_to_id(token) is not None:
                return token
        raise ValueError(f"its {name} is unknown: set {name!r} in {folder / BY_CONTENT[0]}")

    def _named_tokens(self, folder: Path, name: str) -> Iterator[str | None]:
        """Yields the token that each file next to the tokenizer names, or None."""
        for file in BY_CONTENT:
            token = _read_json(folder / file).get(name)
            yield token.get("content") if isinstance(token, dict) else token
        by_id = _read_json(folder / BY_ID).get(f"{name}_id")
        by_id = by_id[0] if isinstance(by_id, list) else by_id
        yield None if by_id is None else self._tokenizer.id_to_token(by_id)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
