"""What makes token ids of text: a SentencePiece model, or a `tokenizer.json` of Hugging Face's."""

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
    """A file is no tokenizer, or does not say what must be known; the message names it."""


def tokenizer_path(name: str) -> Path:
    """Returns the file of the tokenizer called `name`: a path, or "mistral".

    "mistral" is the tokenizer of Mistral 7B and Mixtral 8x7B as the package `mistral-common` brings
    it (32,000 pieces, Apache-2.0).

    Raises:
      FileNotFoundError: there is no such file, or the package is not installed.
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
            f"tokenizer {MISTRAL!r} comes with the package mistral-common: "
            "pip install 'grit-jax[prepare]', or give the path of a tokenizer.model or "
            "tokenizer.json"
        )
    return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"


def tokenizer_in(folder: Path | epath.Path) -> Path | epath.Path | None:
    """Returns the path of a folder's tokenizer, None without one; SentencePiece's comes first."""
    paths = (folder / name for name in (SENTENCEPIECE, HUGGING_FACE))
    return next((path for path in paths if path.is_file()), None)


class Tokenizer:
    """Makes token ids of text, and text of token ids.

    A text never yields the ids of special tokens, whatever is written in it.

    Args:
      name: "mistral", or the path of a SentencePiece model or of a `tokenizer.json`. What begins
        and ends a text is said by the files beside the latter: `tokenizer_config.json`, or else
        `special_tokens_map.json` or `config.json`.

    Attributes:
      vocab_size: number of ids.
      bos_id: of the token that begins a text, `<s>` in the formats of GRIT.
      eos_id: of the token that ends one, `</s>`.
      special_tokens: these tokens, and what stands for the unknown if there is one, by the names
        that transformers has for them.
      file_name: "tokenizer.model" or "tokenizer.json".
      fingerprint: the SHA-256 of the file; of a `tokenizer.json` together with those two ids.

    Raises:
      FileNotFoundError: see `tokenizer_path`.
      TokenizerError: the file is no tokenizer, or nothing says what begins and ends a text.
    """

    def __init__(self, name: str = MISTRAL):
        self.name = name
        path = tokenizer_path(name)
        self._content = content = path.read_bytes()
        digest = hashlib.sha256(content)
        try:
            if path.suffix == ".json":
                self._kind = HuggingFaceTokenizer(path)
                digest.update(f"{self._kind.bos_id} {self._kind.eos_id}".encode())
                self.file_name = HUGGING_FACE
            else:
                self._kind = SentencePieceTokenizer(content)
                self.file_name = SENTENCEPIECE
        except ValueError as error:
            raise TokenizerError(f"tokenizer {path}: {error}") from None
        self.vocab_size: int = self._kind.vocab_size
        self.bos_id: int = self._kind.bos_id
        self.eos_id: int = self._kind.eos_id
        self.special_tokens: dict[str, str] = self._kind.special_tokens()
        self.fingerprint: str = digest.hexdigest()

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> "Tokenizer":
        """Returns the tokenizer of such files as the attribute `files` has."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            return cls(str(tokenizer_in(Path(folder))))

    @property
    def files(self) -> dict[str, bytes]:
        """Name and content of the files that it can be read from again."""
        if self.file_name == SENTENCEPIECE:
            return {SENTENCEPIECE: self._content}
        special = json.dumps(self.special_tokens).encode()
        return {HUGGING_FACE: self._content, BY_CONTENT[0]: special}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without those of its begin and end."""
        return self._kind.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of `ids`; special ids, and those it does not have, leave no trace.

        A model may have more ids than its tokenizer.
        """
        return self._kind.decode(ids)

    def ids(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of `encode` as an array, maybe sooner."""
        return self._kind.ids(text)

    def ids_after(
        self, prefix: str, prefix_ids: Int[np.ndarray, " prefix_tokens"], text: str
    ) -> tuple[Int[np.ndarray, " tokens"], int]:
        """Returns the ids of `prefix + text`, and how many of them belong to the prefix alone.

        The ids are those of the two strings in one, which a tokenizer may split elsewhere than
        between them: ">\\n" and "\\nfoo" may become ">", "\\n\\n" and "foo". The prefix has those
        before the first that is not its own, so that every token with a character of the text
        belongs to the text.

        Args:
          prefix: what stands before the text.
          prefix_ids: its ids, as of `ids`.
          text: not empty.
        """
        ids = self._kind.ids_after(prefix, prefix_ids, text)
        is_shared = ids[: len(prefix_ids)] == prefix_ids[: len(ids)]
        return ids, len(is_shared) if is_shared.all() else int(np.argmin(is_shared))

    def exported(self) -> bytes:
        """Returns the content of a file with which transformers puts the begin before each text."""
        return self._kind.exported()
