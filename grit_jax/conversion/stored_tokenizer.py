"""The tokenizer and the end-of-text tokens of a stored model."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import tempfile

from etils import epath

from grit_jax.bucket import in_bucket
from grit_jax.conversion import ConversionError, Model
from grit_jax.conversion.sidecar_files import copy_tokenizer
from grit_jax.text.tokenizer import MISTRAL, Tokenizer, tokenizer_in

MISTRAL_PIECES = 32_000


def find_tokenizer(stored: Model, name: str | os.PathLike | None) -> Tokenizer | None:
    """Returns the tokenizer of that name, else the model's own, else Mistral's if it fits.

    None of them may be there; such a model reads token ids alone.

    Raises:
      ConversionError: the tokenizer has more pieces than the model.
      FileNotFoundError: there is none of that name.
      TokenizerError: its files are no tokenizer, or do not say what begins and ends a text.
    """
    name = name or tokenizer_in(stored.tokenizer_folder)
    if name is None:
        if stored.config.vocab_size != MISTRAL_PIECES:
            return None
        try:
            return Tokenizer(MISTRAL)
        except FileNotFoundError:  # It comes with a package that only preparing data needs.
            return None
    with _on_disk(name) as path:
        tokenizer = Tokenizer(os.fspath(path))
    if tokenizer.vocab_size > stored.config.vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} pieces, but the model only "
            f"{stored.config.vocab_size}: say tokenizer=PATH of its own"
        )
    return tokenizer


@contextlib.contextmanager
def _on_disk(path: os.PathLike | str) -> Iterator[os.PathLike | str]:
    """Gives the path of a tokenizer, or of a copy of it where it lies in a bucket."""
    if not in_bucket(path):
        yield path
        return
    path = epath.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        copy_tokenizer(path.parent, Path(folder))
        yield copy


def find_end_tokens(stored: Model) -> list[int] | None:
    """Returns the tokens that end an answer of the model, None where that is not said."""
    end = stored.fields.get("eos_token_id")
    return [end] if isinstance(end, int) else end
