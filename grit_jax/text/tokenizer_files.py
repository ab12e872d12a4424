"""The files of a tokenizer, and what those beside the vocabulary say about it."""

from collections.abc import Iterator, Mapping
import importlib.util
import json
from pathlib import Path
from typing import Any

from etils import epath
import tokenizers

MISTRAL = "mistral"
SENTENCEPIECE, HUGGING_FACE = "tokenizer.model", "tokenizer.json"
SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS, MODEL_CONFIG = "added_tokens.json", "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# The tokenizer itself is first. config.json may be the only file that names the EOS token.
TOKENIZER_FILES = (
    HUGGING_FACE,
    SENTENCEPIECE,
    SETTINGS,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    MODEL_CONFIG,
    CHAT_TEMPLATE,
)
# Fields of an added token.
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The field of tokenizer_config.json in which grit-jax saves the tokens that it adds to a text.
GRIT = "grit"


def tokenizer_path(name: str) -> Path:
    """Returns the file of a tokenizer.

    Args:
      name: the path of the file or of its folder, or "mistral" for the tokenizer of Mistral 7B and
        Mixtral 8x7B in the package `mistral-common` (32,000 pieces, Apache-2.0).

    Raises:
      FileNotFoundError: there is no tokenizer, or the package is not installed.
    """
    if name != MISTRAL:
        path = Path(name)
        if path.is_dir():
            found = tokenizer_in(path)
            if found is None:
                raise FileNotFoundError(
                    f"tokenizer {name!r}: the folder has no {HUGGING_FACE} or {SENTENCEPIECE}"
                )
            return Path(found)
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
    """Returns the tokenizer file in a folder, or None.

    As in transformers, tokenizer.json has precedence: only it has all tokens that were added, and a
    tokenizer.model beside it may be of another format (Llama 3).
    """
    paths = (folder / name for name in (HUGGING_FACE, SENTENCEPIECE))
    return next((path for path in paths if path.is_file()), None)


def read_tokenizer_files(folder: Path | epath.Path) -> dict[str, bytes]:
    """Returns the names and contents of a tokenizer's files; empty if the folder has none."""
    if tokenizer_in(folder) is None:
        return {}
    paths = {name: folder / name for name in TOKENIZER_FILES}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}


def read_tokenizer_file(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a tokenizer file's usual name, and its content with the files next to it."""
    name = HUGGING_FACE if path.suffix == ".json" else SENTENCEPIECE
    paths = {other: path.parent / other for other in TOKENIZER_FILES if other != name}
    files = {other: path.read_bytes() for other, path in paths.items() if path.is_file()}
    return name, {name: path.read_bytes(), **files}


def with_saved_settings(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files that prepared data or a run saved, saying what begins and ends a text.

    Before tokenizers said so, BOS began every text, whatever the tokenizer's own files say.
    """
    settings = _json(files, SETTINGS)
    if HUGGING_FACE not in files or GRIT in settings:
        return dict(files)
    settings[GRIT] = {"begin": [settings["bos_token"]], "end": []}
    return {**files, SETTINGS: json.dumps(settings).encode()}


class TokenizerSettings:
    """What the files beside a vocabulary say: special tokens, added tokens, and BOS and EOS.

    The rules are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`).

    Args:
      files: names and contents of the files.

    Raises:
      ValueError: a file is not JSON.
    """

    def __init__(self, files: Mapping[str, bytes]):
        self.settings = _json(files, SETTINGS)
        self._added_by_id = self.settings.get("added_tokens_decoder")
        self._special = {} if self._added_by_id else _json(files, SPECIAL_TOKENS)
        self._added = {} if self._added_by_id else _json(files, ADDED_TOKENS)
        self._model = _json(files, MODEL_CONFIG)
        self._chat_template = files.get(CHAT_TEMPLATE, b"").decode()

    def named_tokens(self, name: str) -> Iterator[str]:
        """Yields the tokens that the files name as "bos_token", "eos_token", ..., best first."""
        for fields in (self._special, self.settings):
            if (token := _content(fields.get(name))) is not None:
                yield token

    def is_without(self, name: str) -> bool:
        """Returns whether the files say that there is no such token, as Qwen's for BOS."""
        return name in self.settings and not any(self.named_tokens(name))

    def token_id(self, name: str) -> int | None:
        """Returns the ID of "bos_token", "eos_token", ... in config.json, if it is there."""
        token_id = self._model.get(f"{name}_id")
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        return token_id if isinstance(token_id, int) else None

    def chat_template(self) -> str:
        """Returns the chat template in Jinja, "" if the files have none."""
        named = self.settings.get("chat_template") or ""
        if isinstance(named, list):
            templates = {each.get("name"): each.get("template") for each in named}
            named = templates.get("default") or ""
        return self._chat_template or named

    def special_tokens(self) -> set[str]:
        """Returns the tokens that the files call special."""
        special: set[str] = set()
        for fields in (self._special, self.settings):
            for name, value in fields.items():
                if name in ("additional_special_tokens", "extra_special_tokens") and value:
                    listed = value.values() if isinstance(value, dict) else value
                    special.update(filter(None, map(_content, listed)))
                elif name.endswith("_token") and (token := _content(value)) is not None:
                    special.add(token)
        return special

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Returns the tokens that were added to the vocabulary, by their IDs."""
        added = {int(i): _added_token(fields) for i, fields in (self._added_by_id or {}).items()}
        special = self.special_tokens()
        for token, token_id in self._added.items():
            is_special = token in special
            added[token_id] = tokenizers.AddedToken(
                token, special=is_special, normalized=not is_special
            )
        return added


def tokens_of_json(content: bytes) -> dict[int, tokenizers.AddedToken]:
    """Returns the added tokens of a tokenizer.json, by their IDs."""
    listed = _json({HUGGING_FACE: content}, HUGGING_FACE).get("added_tokens") or ()
    return {token["id"]: _added_token(token) for token in listed}


def matched_in_raw_text(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    """Returns an added token that is looked for before text is normalized.

    A SentencePiece tokenizer then inserts a space before the text that follows the token.
    """
    flags = {name: getattr(token, name) for name in FLAGS}
    return tokenizers.AddedToken(token.content, **flags | {"normalized": False})


def _added_token(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
    given = {name: fields[name] for name in FLAGS if name in fields}
    return tokenizers.AddedToken(fields["content"], **given)


def _content(token: Any) -> str | None:
    """Returns the text of a token, which files give as a string or an object."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
