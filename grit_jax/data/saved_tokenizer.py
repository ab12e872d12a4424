"""The tokenizer that data were prepared with, kept beside them: in TOKENIZERS/FINGERPRINT."""

from etils import epath

from grit_jax.data.manifest import PreparedDataset
from grit_jax.data.storage import read_file
from grit_jax.text.tokenizer import Tokenizer

TOKENIZERS = "tokenizers"


def save_tokenizer(tokenizer: Tokenizer, output: epath.Path) -> None:
    """Writes a tokenizer's files into a folder of prepared data, unless they are there."""
    folder = _folder(output, tokenizer.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:  # It may have been cut off.
            path.write_bytes(content)


def saved_tokenizer_files(dataset: PreparedDataset) -> dict[str, bytes]:
    """Returns the files of the tokenizer that a dataset was prepared with, none of older data.

    Raises:
      PreparedDataError: one is missing.
    """
    described = dataset.manifest.tokenizer
    folder = _folder(dataset.folder.parent.parent, described["sha256"])
    return {name: read_file(folder / name) for name in described.get("files", ())}


def load_saved_tokenizer(dataset: PreparedDataset) -> Tokenizer:
    """Returns the tokenizer that a dataset was prepared with; of older data, the one of its name.

    Raises:
      FileNotFoundError: it is not kept, nor where it was.
      PreparedDataError: a file of it is missing.
    """
    files = saved_tokenizer_files(dataset)
    name = dataset.manifest.tokenizer["name"]
    return Tokenizer.of_files(files) if files else Tokenizer(name)


def _folder(output: epath.Path, fingerprint: str) -> epath.Path:
    return output / TOKENIZERS / fingerprint[:16]
