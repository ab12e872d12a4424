"""Tokenizers by name or of a stored model, and the tokens that end its texts."""

import os
from pathlib import Path
import warnings

from grit_jax.bucket import in_bucket, open_bucket
from grit_jax.conversion.gguf_model import SUFFIX, read_tokenizer_of_gguf
from grit_jax.conversion.opening import open_model
from grit_jax.conversion.stored_model import ConversionError, StoredModel
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.text.tokenizer import Tokenizer, TokenizerError
from grit_jax.text.tokenizer_files import MISTRAL, read_tokenizer_files

# Models that may have Mistral's tokenizer, and the size of its vocabulary.
MISTRAL_MODEL_TYPES, MISTRAL_VOCAB_SIZE = ("mistral", "mixtral"), 32_000
# What names a tokenizer, for help texts.
TOKENIZER_NAMES = (
    "'mistral', or the path of a tokenizer.model, a tokenizer.json, a GGUF file, or of a model's, "
    "checkpoint's or run's folder"
)


def open_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer with a name.

    Args:
      name: "mistral", or the path of a SentencePiece model, a tokenizer.json, a GGUF file, or of
        the folder of a model, a checkpoint or a run. Folders may be in a bucket.

    Raises:
      BucketError: the bucket cannot be read.
      ConversionError: the folder or GGUF file has no tokenizer.
      FileNotFoundError: there is no such file.
      TokenizerError: the tokenizer's files are damaged or name no EOS token.
    """
    name = os.fspath(name)
    if in_bucket(name):
        path = open_bucket(name)
    else:
        path = Path(name)
        if path.suffix == SUFFIX and path.is_file():
            return Tokenizer.of_files(read_tokenizer_of_gguf(path), name)
        if name == MISTRAL or not path.is_dir():
            return Tokenizer(name)
    files = read_tokenizer_files(path) or open_model(name).tokenizer_files
    if not files:
        raise ConversionError(f"{name} has no tokenizer.json or tokenizer.model")
    return Tokenizer.of_files(files, name)


def find_tokenizer(stored: StoredModel, name: str | os.PathLike | None = None) -> Tokenizer | None:
    """Returns the tokenizer for a stored model.

    Args:
      stored: the model.
      name: see `open_tokenizer`. None takes the model's own tokenizer or, with a warning, Mistral's
        for a Mistral or Mixtral without one whose vocabulary has its size.

    Returns:
      The tokenizer, or None if there is none; such a model takes only token ids.

    Raises:
      ConversionError: the tokenizer has more tokens than the model's vocabulary.
      FileNotFoundError: there is no tokenizer called `name`.
      TokenizerError: the tokenizer's files are damaged or name no EOS token.
    """
    if name is not None:
        tokenizer = open_tokenizer(name)
        template = _chat_template(stored)
        if template is not None:
            tokenizer = tokenizer.with_chat_template(template)
    elif stored.tokenizer_files:
        tokenizer = Tokenizer.of_files(stored.tokenizer_files, str(stored.folder))
    elif not may_have_mistrals(stored):
        return None
    else:
        try:
            tokenizer = Tokenizer(MISTRAL)
        except FileNotFoundError:  # It comes with a package of the extra `prepare`.
            return None
        warnings.warn(
            f"{stored.folder} has no tokenizer: the one of Mistral 7B is used; name another with "
            "tokenizer=PATH (--tokenizer PATH)",
            UserWarning,
            stacklevel=3,
        )
    if tokenizer.base_vocab_size > stored.config.vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name} has {tokenizer.base_vocab_size} tokens, but "
            f"{stored.folder} only {stored.config.vocab_size}: give the model's own with "
            "tokenizer=PATH (--tokenizer PATH)"
        )
    return tokenizer


def _chat_template(stored: StoredModel) -> str | None:
    """Returns a model's chat template, "" for GRIT's, or None if none can be read."""
    try:
        files = stored.tokenizer_files
        if files:
            return Tokenizer.of_files(files, str(stored.folder)).chat_template
    except (ConversionError, TokenizerError):
        return None  # Which is why another tokenizer is given.
    return "" if GRIT_FIELD in stored.fields else None


def may_have_mistrals(stored: StoredModel) -> bool:
    """Returns whether a model without a tokenizer may have been trained with Mistral's."""
    is_mistral = stored.fields.get("model_type") in MISTRAL_MODEL_TYPES
    return is_mistral and stored.config.vocab_size == MISTRAL_VOCAB_SIZE


def find_end_tokens(stored: StoredModel) -> list[int] | None:
    """Returns the ids of the tokens that end an answer, or None if config.json names none."""
    end = stored.fields.get("eos_token_id")
    return [end] if isinstance(end, int) else end
