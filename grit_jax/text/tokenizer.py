"""Tokenizers: a SentencePiece model, or a `tokenizer.json` of Hugging Face."""

from collections.abc import Callable, Mapping
import copy
import functools
import hashlib
import json
import os

from jaxtyping import Int
import numpy as np

from grit_jax.text.hugging_face_tokenizer import HuggingFaceTokenizer
from grit_jax.text.sentencepiece_conversion import convert_sentencepiece, has_user_defined
from grit_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer
from grit_jax.text.templates import exported_chat_template
from grit_jax.text.tokenizer_files import (
    GRIT,
    HUGGING_FACE,
    MISTRAL,
    SENTENCEPIECE,
    SETTINGS,
    TokenizerSettings,
    matched_in_raw_text,
    read_tokenizer_file,
    tokenizer_path,
    tokens_of_json,
)


class TokenizerError(ValueError):
    """A file is not a usable tokenizer; the message names the file and the reason."""


class Tokenizer:
    """Converts text to token ids and back.

    Text never becomes special tokens: "</s>" in a text is encoded as four characters. Other tokens
    that were added to the vocabulary, such as "<tool_call>", are tokens in a text, too.

    Which tokens begin and end a text is read from the tokenizer's files, as transformers reads
    them: the post-processor of a `tokenizer.json`; `add_bos_token` and `add_eos_token` of
    `tokenizer_config.json` for a SentencePiece model. A SentencePiece model alone adds BOS.

    Args:
      name: "mistral", or the path of a SentencePiece model, of a `tokenizer.json` or of a folder
        with one of them. The files of transformers next to it name its special and added tokens.

    Attributes:
      name: the argument.
      vocab_size: number of ids that a text may have, including those that begin and end it.
      base_vocab_size: the same without tokens that were added to the vocabulary.
      begin_ids, end_ids: ids that begin and end a text to embed; `begin_ids` also begin a prompt.
      adds_bos, adds_eos: whether there are such ids.
      bos_id: id of the token that begins a text (`<s>`), or None: Qwen has none.
      eos_id: id of the token that ends a text (`</s>`).
      special_tokens: these tokens, and the unknown token if there is one, by their names in
        transformers ("bos_token", ...).
      control_tokens: all special tokens with their ids.
      file_name: "tokenizer.model" or "tokenizer.json".
      fingerprint: SHA-256 of the file and of what else defines the tokenizer.
      chat_template: the chat template among the files, in Jinja; "" if there is none or it is
        GRIT's. It is no part of `files`.

    Raises:
      FileNotFoundError: see `tokenizer_path`.
      TokenizerError: the file is not a tokenizer, or its EOS token is unknown.
    """

    def __init__(self, name: str | os.PathLike = MISTRAL):
        path = tokenizer_path(os.fspath(name))
        file_name, files = read_tokenizer_file(path)
        if name == MISTRAL:
            files = {file_name: files[file_name]}
        self._initialize(os.fspath(name), files, file_name)

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], name: str = "") -> "Tokenizer":
        """Returns the tokenizer of some files, given by their names and contents.

        Args:
          files: what the property `files` or `read_tokenizer_files` returns.
          name: stands for the tokenizer in error messages.
        """
        tokenizer = cls.__new__(cls)
        file_name = HUGGING_FACE if HUGGING_FACE in files else SENTENCEPIECE
        tokenizer._initialize(name, files, file_name)
        return tokenizer

    def _initialize(self, name: str, files: Mapping[str, bytes], file_name: str) -> None:
        self.name = name
        try:
            settings = TokenizerSettings(files)
            self.chat_template = settings.chat_template()
            self._backend = backend = _backend(files, file_name, settings)
            self.special_tokens = _special_tokens(backend, settings)
            if isinstance(backend, HuggingFaceTokenizer):
                special = settings.special_tokens()
                backend.mark_special(special.union(self.special_tokens.values()))
            self._begin, self._end = _tokens_around(
                backend, settings, self.special_tokens, is_json=file_name == HUGGING_FACE
            )
        except ValueError as error:
            raise TokenizerError(f"tokenizer {name or file_name}: {error}") from None
        is_sentencepiece = isinstance(backend, SentencePieceTokenizer)
        self.file_name = SENTENCEPIECE if is_sentencepiece else HUGGING_FACE
        self.control_tokens = backend.control_tokens
        begin, end = ([_id(backend, token) for token in t] for t in (self._begin, self._end))
        self.begin_ids, self.end_ids = np.array(begin, np.int32), np.array(end, np.int32)
        self.adds_bos, self.adds_eos = bool(begin), bool(end)
        bos = self.special_tokens.get("bos_token")
        self.bos_id: int | None = None if bos is None else _id(backend, bos)
        self.eos_id: int = _id(backend, self.special_tokens["eos_token"])
        own = [*begin, *end, self.eos_id]
        if self.chat_template in (exported_chat_template(adds_bos=adds) for adds in (True, False)):
            self.chat_template = ""
        self.vocab_size, self.base_vocab_size = (
            1 + max([last, *own]) for last in (backend.last_id, backend.last_base_id)
        )

    def with_chat_template(self, source: str) -> "Tokenizer":
        """Returns this tokenizer with another chat template; "" is GRIT's."""
        other = copy.copy(self)
        other.chat_template = source
        return other

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, and of what else defines the tokenizer."""
        digest = hashlib.sha256(self._backend.content)
        if self.file_name == HUGGING_FACE or self._has_other_special_tokens:
            digest.update(f"{self.bos_id} {self.eos_id}".encode())
        if not self._adds_only_bos:
            digest.update(f"{self.begin_ids.tolist()} {self.end_ids.tolist()}".encode())
        return digest.hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        """Name and content of the files that define the tokenizer."""
        files = {self.file_name: self._backend.content}
        is_sentencepiece = self.file_name == SENTENCEPIECE
        if is_sentencepiece and self._adds_only_bos and not self._has_other_special_tokens:
            return files  # It needs no settings.
        settings = {**self.special_tokens, GRIT: {"begin": self._begin, "end": self._end}}
        return files | {SETTINGS: json.dumps(settings).encode()}

    @property
    def _adds_only_bos(self) -> bool:
        """Whether BOS begins texts and nothing ends them, as for all tokenizers before."""
        return self._begin == [self.special_tokens.get("bos_token")] and not self._end

    @property
    def _has_other_special_tokens(self) -> bool:
        """Whether a SentencePiece model names other special tokens than the files beside it."""
        return self.special_tokens != self._backend.special_tokens

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

    def encode_markup(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens are tokens, as for transformers.

        Only use it for text of a trusted program: in a user's text, "</s>" would end the text.
        """
        return self._backend.encode_markup(text)

    def with_renamed_tokens(
        self, names: Mapping[str, str]
    ) -> Callable[[str], tuple[list[int], list[tuple[int, int]]]]:
        """Returns a function from a text to its ids, and to the characters that each id stands for.

        Args:
          names: control tokens, and the names that stand for them in the text. Their former names
            are ordinary text.

        Raises:
          TokenizerError: a SentencePiece model has no equal tokenizer.json.
        """
        backend = self._backend
        if isinstance(backend, SentencePieceTokenizer):
            backend = HuggingFaceTokenizer(self.exported())
        renamed = backend.with_renamed_tokens(names)

        def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
            encoding = renamed.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets

        return encode

    def exported(self) -> bytes:
        """Returns a tokenizer.json that begins and ends each text as this tokenizer does.

        Raises:
          TokenizerError: no tokenizer.json has the same ids as this SentencePiece model.
        """
        try:
            return self._backend.exported(self._begin, self._end)
        except ValueError as error:
            raise TokenizerError(
                f"tokenizer {self.name or self.file_name} cannot be written as tokenizer.json: "
                f"{error}"
            ) from None

    @property
    def sentencepiece_model(self) -> bytes | None:
        """The SentencePiece model, or None if this tokenizer is another or has added tokens."""
        return self._backend.content if self.file_name == SENTENCEPIECE else None


def _backend(
    files: Mapping[str, bytes], file_name: str, settings: TokenizerSettings
) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    added, special = settings.added_tokens(), settings.special_tokens()
    if file_name == HUGGING_FACE:
        return HuggingFaceTokenizer(files[HUGGING_FACE], added)
    model = SentencePieceTokenizer(files[SENTENCEPIECE])
    if HUGGING_FACE in files:
        added = tokens_of_json(files[HUGGING_FACE]) | added
    control = model.control_tokens
    has_added = any(control.get(token.content) != i for i, token in added.items())
    if not has_added and not any(model.token_id(t) is not None for t in special - control.keys()):
        return model
    if has_user_defined(model.content):  # Converted, "</s>" beside one of them could become EOS.
        raise ValueError("it has user-defined pieces and added tokens: use a tokenizer.json")
    added = {i: matched_in_raw_text(token) for i, token in added.items()}
    names = {i: token.content for i, token in added.items() if i < model.vocab_size}
    is_legacy = settings.settings.get("legacy") is not False
    converted = convert_sentencepiece(model.content, names, is_legacy=is_legacy)
    backend = HuggingFaceTokenizer(converted.to_str().encode(), added)
    backend.special_tokens = model.special_tokens
    return backend


def _special_tokens(
    backend: HuggingFaceTokenizer | SentencePieceTokenizer, settings: TokenizerSettings
) -> dict[str, str]:
    """Returns BOS, EOS and the unknown token by their names in transformers.

    Raises:
      ValueError: there is no EOS token.
    """
    special = dict(backend.special_tokens)
    for name in ("bos_token", "eos_token"):
        known = [t for t in settings.named_tokens(name) if backend.token_id(t) is not None]
        if known:
            special[name] = known[0]
        elif name == "bos_token" and settings.is_without(name):
            special.pop(name, None)
        elif name not in special and (token := backend.token(settings.token_id(name))) is not None:
            special[name] = token
    if "eos_token" not in special:
        raise ValueError(f"its eos_token is unknown: set 'eos_token' in {SETTINGS}")
    return special


def _tokens_around(
    backend: HuggingFaceTokenizer | SentencePieceTokenizer,
    settings: TokenizerSettings,
    special: Mapping[str, str],
    *,
    is_json: bool,
) -> tuple[list[str], list[str]]:
    """Returns the tokens before and after each text."""
    if GRIT in settings.settings:
        saved = settings.settings[GRIT]
        return saved["begin"], saved["end"]
    if is_json and isinstance(backend, HuggingFaceTokenizer):
        return backend.tokens_around()
    adds_bos = settings.settings.get("add_bos_token", not settings.settings)
    adds_eos = settings.settings.get("add_eos_token", False)
    begin = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    return begin, [special["eos_token"]] if adds_eos else []


def _id(backend: HuggingFaceTokenizer | SentencePieceTokenizer, token: str) -> int:
    token_id = backend.token_id(token)
    if token_id is None:
        raise TokenizerError(f"the tokenizer has no token {token!r}")
    return token_id
