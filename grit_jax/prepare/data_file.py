"""A file of rows, of any type that is read."""

from collections.abc import Iterator
import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from grit_jax.prepare.tables import ARROW_SUFFIXES, DELIMITERS, is_arrow, read_arrow, read_csv
from grit_jax.text.compression import (
    COMPRESSION_SUFFIXES,
    READ_ERRORS,
    start_of_file,
    without_compression_suffix,
)
from grit_jax.text.jsonl import (
    MEGABYTE,
    START_BYTES,
    Block,
    SourceError,
    has_objects_of_several_lines,
    read_blocks,
)

SUFFIXES = (".jsonl", ".json", *DELIMITERS, *ARROW_SUFFIXES)
# For messages.
FILE_TYPES = f"{', '.join(SUFFIXES)}, and the first four with .gz or .zst"
# Approximate ratio of sizes in memory and on disk.
COMPRESSION_RATIO = 4


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Attributes:
      path: where it is.
    """

    path: epath.Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name for reports of rejected rows."""
        return self.path.name

    @property
    def size(self) -> int:
        """Stored bytes."""
        return self.path.stat().length

    @property
    def size_in_memory(self) -> int:
        """Approximate bytes of the rows."""
        is_compressed = str(self.path).endswith((*COMPRESSION_SUFFIXES, ".parquet"))
        return self.size * (COMPRESSION_RATIO if is_compressed else 1)

    def describe(self) -> list[dict[str, Any]]:
        """Returns name, size and SHA-256 of the files that the rows are from."""
        return [describe_file(self.path)]

    def read(self, block_bytes: int) -> Iterator[Block]:
        """Yields blocks of about `block_bytes`.

        Raises:
          SourceError: the file cannot be read or is damaged.
        """
        if without_compression_suffix(str(self.path)).endswith(tuple(DELIMITERS)):
            return read_csv(self.path, block_bytes)
        if _is_arrow(self.path):
            return read_arrow(self.path, block_bytes)
        return read_blocks(self.path, block_bytes)


def _is_arrow(path: epath.Path) -> bool:
    try:
        return is_arrow(path)
    except READ_ERRORS as error:
        raise SourceError(f"{path}: {error}") from None


def describe_file(file: epath.Path) -> dict[str, Any]:
    """Returns a file's name, size and SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(MEGABYTE):
            digest.update(chunk)
    return {"name": file.name, "bytes": file.stat().length, "sha256": digest.hexdigest()}


def is_data_file(path: epath.Path) -> bool:
    """Returns whether a file of a folder is of a known type.

    Raises:
      SourceError: it cannot be read.
    """
    name = without_compression_suffix(path.name)
    if not name.endswith(SUFFIXES):
        return False
    if not name.endswith(".json"):
        return True
    try:  # A .json file of a single object is rather a description than data.
        return not has_objects_of_several_lines(start_of_file(path, START_BYTES))
    except READ_ERRORS as error:
        raise SourceError(f"{path}: {error}") from None


def stem_of_name(name: str) -> str:
    """Returns a file name without its suffixes."""
    name = without_compression_suffix(name)
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      SourceError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}") from None
