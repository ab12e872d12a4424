"""The tokenizer and the end-of-text tokens of a stored model."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import tempfile

from etils import epath

from grit_jax.bucket import in_bucket
from grit_jax.conversion.sidecar_files import copy_tokenizer
from grit_jax.conversion.stored_model import ConversionError, StoredModel
from grit_jax.text.tokenizer import MISTRAL, Tokenizer, tokenizer_in

MISTRAL_VOCAB_SIZE = 32_000


def find_tokenizer(stored: StoredModel, name: str | os.PathLike | None) -> Tokenizer | None:
    """Returns the tokenizer for a stored model.

    Args:
      stored: the model.
      name: "mistral" or the path of a tokenizer. None takes the model's own tokenizer, or Mistral's
        for a model without one whose vocabulary has Mistral's size.

    Returns:
      The tokenizer, or None if there is none; such a model takes only token ids.

    Raises:
      ConversionError: the tokenizer has more tokens than the model's vocabulary.
      FileNotFoundError: there is no tokenizer called `name`.
      TokenizerError: the tokenizer's files are damaged or name no BOS and EOS tokens.
    """
    name = name or tokenizer_in(stored.tokenizer_folder)
    if name is None:
        if stored.config.vocab_size != MISTRAL_VOCAB_SIZE:
            return None
        try:
            return Tokenizer(MISTRAL)
        except FileNotFoundError:  # It comes with a package of the extra `data`.
            return None
    with _on_disk(name) as path:
        tokenizer = Tokenizer(os.fspath(path))
    if tokenizer.vocab_size > stored.config.vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model only "
            f"{stored.config.vocab_size}: give the model's own with tokenizer=PATH"
        )
    return tokenizer


@contextlib.contextmanager
def _on_disk(path: os.PathLike | str) -> Iterator[os.PathLike | str]:
    """Yields the path of a tokenizer, or of a temporary copy if the tokenizer is in a bucket."""
    if not in_bucket(path):
        yield path
        return
    path = epath.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        copy_tokenizer(path.parent, Path(folder))
        yield copy


def find_end_tokens(stored: StoredModel) -> list[int] | None:
    """Returns the ids of the tokens that end an answer, or None if config.json names none."""
    end = stored.fields.get("eos_token_id")
    return [end] if isinstance(end, int) else end
