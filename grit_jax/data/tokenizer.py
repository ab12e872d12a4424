"""Text to token ids with SentencePiece, the reference for Mistral's tokenizer."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import sentencepiece

MISTRAL = "mistral"


def tokenizer_path(name: str) -> Path:
    """Returns the SentencePiece model called `name`: a path, or "mistral".

    "mistral" is the tokenizer of Mistral 7B and Mixtral 8x7B as the package `mistral-common` brings
    it (32,000 pieces, Apache-2.0).

    Raises:
      FileNotFoundError: there is no such file, or the package is not installed.
    """
    if name != MISTRAL:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {name!r}: no such file (or use {MISTRAL!r})")
        return path
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"tokenizer {MISTRAL!r} comes with the package mistral-common: "
            "pip install 'grit-jax[data]', or give the path of a tokenizer.model"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


class Tokenizer:
    """A SentencePiece model; its text never yields the special ids `bos_id` and `eos_id`.

    Args:
      name: "mistral", or the path of a SentencePiece model.

    Raises:
      FileNotFoundError: see `tokenizer_path`.
    """

    def __init__(self, name: str = MISTRAL):
        self.name = name
        self._model_bytes = tokenizer_path(name).read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model_bytes)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without `<s>` and `</s>`."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`; special ids leave no trace."""
        return self._processor.decode(ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the SentencePiece model."""
        return hashlib.sha256(self._model_bytes).hexdigest()
