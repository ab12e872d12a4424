"""Tokenizers: a SentencePiece model, or a `tokenizer.json` of Hugging Face."""

from collections.abc import Mapping
import hashlib
import importlib.util
import json
from pathlib import Path
import tempfile

from etils import epath
from jaxtyping import Int
import numpy as np

from grit_jax.text.hugging_face_tokenizer import BY_CONTENT, HuggingFaceTokenizer
from grit_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer

MISTRAL = "mistral"
SENTENCEPIECE, HUGGING_FACE = "tokenizer.model", "tokenizer.json"


class TokenizerError(ValueError):
    """A file is not a usable tokenizer; the message names the file and the reason."""


def tokenizer_path(name: str) -> Path:
    """Returns the file of a tokenizer.

    Args:
      name: the path of the file, or "mistral" for the tokenizer of Mistral 7B and Mixtral 8x7B in
        the package `mistral-common` (32,000 pieces, Apache-2.0).

    Raises:
      FileNotFoundError: the file does not exist, or the package is not installed.
    """
    if name != MISTRAL:
        path = Path(name)
        if path.is_dir():
            raise FileNotFoundError(
                f"tokenizer {name!r} is a folder: name the {SENTENCEPIECE} or {HUGGING_FACE} in it"
            )
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {name!r}: no such file (or use {MISTRAL!r})")
        return path
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            f"tokenizer {MISTRAL!r} needs the package mistral-common: "
            "pip install 'grit-jax[prepare]', or give the path of a tokenizer.model or "
            "tokenizer.json"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def tokenizer_in(folder: Path | epath.Path) -> Path | epath.Path | None:
    """Returns the tokenizer file in a folder, preferring SentencePiece, or None."""
    paths = (folder / name for name in (SENTENCEPIECE, HUGGING_FACE))
    return next((path for path in paths if path.is_file()), None)


class Tokenizer:
    """Converts text to token ids and back.

    Text never becomes special tokens: "</s>" in a text is encoded as four characters.

    Args:
      name: "mistral", or the path of a SentencePiece model or of a `tokenizer.json`. For the
        latter, the begin and end tokens are those in `tokenizer_config.json`,
        `special_tokens_map.json` or `config.json` in the same folder.

    Attributes:
      vocab_size: number of ids.
      bos_id: id of the token that begins a text (`<s>`).
      eos_id: id of the token that ends a text (`</s>`).
      special_tokens: these tokens, and the unknown token if there is one, by their names in
        transformers ("bos_token", ...).
      file_name: "tokenizer.model" or "tokenizer.json".
      fingerprint: SHA-256 of the file; for a `tokenizer.json`, also of the begin and end ids.

    Raises:
      FileNotFoundError: see `tokenizer_path`.
      TokenizerError: the file is not a tokenizer, or its begin or end token is unknown.
    """

    def __init__(self, name: str = MISTRAL):
        self.name = name
        path = tokenizer_path(name)
        self._content = content = path.read_bytes()
        digest = hashlib.sha256(content)
        try:
            if path.suffix == ".json":
                self._backend = HuggingFaceTokenizer(path)
                digest.update(f"{self._backend.bos_id} {self._backend.eos_id}".encode())
                self.file_name = HUGGING_FACE
            else:
                self._backend = SentencePieceTokenizer(content)
                self.file_name = SENTENCEPIECE
        except ValueError as error:
            raise TokenizerError(f"tokenizer {path}: {error}") from None
        self.vocab_size: int = self._backend.vocab_size
        self.bos_id: int = self._backend.bos_id
        self.eos_id: int = self._backend.eos_id
        self.special_tokens: dict[str, str] = self._backend.special_tokens()
        self.fingerprint: str = digest.hexdigest()

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Returns the tokenizer of the names and contents that the property `files` returns."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return cls(str(tokenizer_in(Path(folder))))

    @property
    def files(self) -> dict[str, bytes]:
        """Name and content of the files that define the tokenizer."""
        if self.file_name == SENTENCEPIECE:
            return {SENTENCEPIECE: self._content}
        special = json.dumps(self.special_tokens).encode()
        return {HUGGING_FACE: self._content, BY_CONTENT[0]: special}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end token."""
        return self._backend.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`, skipping special and unknown ids.

        A model may have more ids than its tokenizer.
        """
        return self._backend.decode(ids)

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode` as an array. This is faster if words repeat."""
        return self._backend.ids(text)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> tuple[Int[np.ndarray, " tokens"], int]:
        """Returns the ids of `prefix + text`, and how many of them belong to the prefix.

        A token may span the boundary: ">\\n" and "\\nfoo" may become ">", "\\n\\n" and "foo". Such
        a token belongs to the text.

        Args:
          prefix: the string before the text.
          prefix_ids: the ids of `prefix`.
          text: the text, not empty.
        """
        ids = self._backend.ids_after(prefix, prefix_ids, text)
        is_prefix = ids[: len(prefix_ids)] == prefix_ids[: len(ids)]
        return ids, len(is_prefix) if is_prefix.all() else int(np.argmin(is_prefix))

    def exported(self) -> bytes:
        """Returns the file for transformers, which then prepends the begin token to each text."""
        return self._backend.exported()
