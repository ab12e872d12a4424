"""Sources of datasets, and how they are divided into work items for the workers."""

import abc
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

import grit_jax
from grit_jax.prepare.data_file import DataFile
from grit_jax.prepare.files import DataFiles
from grit_jax.prepare.worker import RowsWorkItem, WorkItem
from grit_jax.text.jsonl import MEGABYTE

# Work items per worker: one being tokenized, and one waiting.
ITEMS_PER_PROCESS = 2
# A block becomes a shard: small enough to keep all workers busy, large enough for few files.
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = MEGABYTE // 4, 32 * MEGABYTE
BLOCKS_PER_PROCESS = 4
# Limit on the bytes of all blocks in memory, for any number of workers.
MAX_BYTES_IN_MEMORY = 512 * MEGABYTE


class Source(abc.ABC):
    """The data that a dataset is prepared from.

    Attributes:
      files: its files, or None for another source.
      size: bytes of its files; None if unknown.
    """

    files: DataFiles | None = None
    size: int | None = None

    @property
    @abc.abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that the source itself defines. Preparing fails if one of them is empty."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what the dataset is made from; if it changes, the dataset is prepared again."""

    @abc.abstractmethod
    def work_items(self, dataset: str, num_processes: int) -> Iterator[tuple[WorkItem, int]]:
        """Yields the pieces of the dataset, each with the amount of `size` read up to its end.

        Raises:
          SourceError: the data cannot be read.
        """


class FilesSource(Source):
    """Files of rows."""

    def __init__(self, files: DataFiles):
        self.files: DataFiles = files
        self.size = sum(file.size for split in files.files.values() for file in split)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have separate files."""
        return tuple(self.files.files)

    def describe(self) -> dict[str, Any]:
        """Returns name, size and SHA-256 of each file, and how rows are changed and split."""
        described: dict[str, Any] = {
            "files": {
                split: [described for file in files for described in file.describe()]
                for split, files in self.files.files.items()
            }
        }
        if self.files.preprocess is not None:
            described["preprocess"] = describe_functions([self.files.preprocess])
        if self.files.held_out:
            described |= {"held_out": self.files.held_out, "seed": self.files.seed}
        if self.files.columns:
            described["columns"] = dict(self.files.columns)
        return described

    def work_items(self, dataset: str, num_processes: int) -> Iterator[tuple[WorkItem, int]]:
        """Yields blocks of rows, each with the number of stored bytes read up to its end."""
        number = position = 0
        for split, files in self.files.files.items():
            for file in files:
                for block in file.read(_block_bytes(file, num_processes)):
                    item = RowsWorkItem(dataset, split, number, file.name, block)
                    yield item, position + block.position
                    number += 1
                position += file.size


def _block_bytes(file: DataFile, num_processes: int) -> int:
    wanted = file.size_in_memory // (BLOCKS_PER_PROCESS * num_processes)
    largest = min(MAX_BLOCK_BYTES, MAX_BYTES_IN_MEMORY // (ITEMS_PER_PROCESS * num_processes))
    return max(min(wanted, largest), MIN_BLOCK_BYTES)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset to prepare.

    Attributes:
      name: name of its folder.
      kind: name of its kind of text.
      source: what it is read from.
    """

    name: str
    kind: str
    source: Source


# Types whose repr is the same in every process.
PLAIN_TYPES = (str, int, float, tuple, list, dict, Path, type(None))


def describe_functions(functions: Sequence[Callable]) -> list[dict[str, str]]:
    """Returns each function's name, and the SHA-256 of the file that defines it.

    The functions of this package have no SHA-256: `TEXT_VERSION` covers them.
    """
    return [_describe_function(function) for function in functions]


def _describe_function(function: Any) -> dict[str, str]:
    if isinstance(function, functools.partial):
        arguments = repr((function.args, sorted(function.keywords.items())))
        return _describe_function(function.func) | {"arguments": arguments}
    function = inspect.unwrap(function)
    if not hasattr(function, "__qualname__"):  # A callable object.
        function = type(function)
    described = {"name": f"{function.__module__}.{function.__qualname__}"}
    if described["name"].startswith(f"{grit_jax.__name__}."):
        return described
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if plain := [repr(value) for value in cells if isinstance(value, PLAIN_TYPES)]:
        described["closure"] = ", ".join(plain)
    try:
        code = Path(inspect.getfile(function)).read_text()
    except (TypeError, OSError):  # A built-in function.
        return described
    return described | {"sha256": hashlib.sha256(code.encode()).hexdigest()}
