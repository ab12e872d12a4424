"""The files of a dataset, its splits, and its kind."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any

from etils import epath

from grit_jax.prepare.data_file import DataFile
from grit_jax.prepare.finding import find_files
from grit_jax.text.columns import LAYOUTS, RowReader
from grit_jax.text.formats import Preprocess
from grit_jax.text.jsonl import MEGABYTE, SourceError, is_held_out
from grit_jax.text.kinds import kind_of_line

# Said of files without a row.
EMPTY = " (empty)"

# A file or folder, or several.
Paths = epath.PathLike | Sequence[epath.PathLike]


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """The files of a dataset.

    Attributes:
      files: the files of each split, in order.
      preprocess: function on each row, or None.
      held_out: fraction of the rows of "train" that forms the split "held_out".
      seed: seed for choosing these rows.
      columns: the columns to read for each name (see `RowReader`).
    """

    files: Mapping[str, tuple[DataFile, ...]]
    preprocess: Preprocess | None = None
    held_out: float = 0.0
    seed: int = 0
    columns: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def find(
        cls,
        files: Paths | Mapping[str, Paths],
        preprocess: Preprocess | None = None,
        held_out: float = 0.0,
        seed: int = 0,
    ) -> "DataFiles":
        """Returns the data files in files and folders.

        Args:
          files: for each split a file or folder, or several; without splits, those of "train".
          preprocess: function from a row to one in an accepted format, or to None to skip it.
          held_out: fraction of the rows of "train" that forms the split "held_out".
          seed: seed for choosing these rows.

        Raises:
          SourceError: a file or folder does not exist, or `held_out` is not a valid fraction.
        """
        by_split = files if isinstance(files, Mapping) else {"train": files}
        found = {
            split: tuple(
                file
                for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
                for file in find_files(path)
            )
            for split, paths in by_split.items()
        }
        return cls(found, preprocess, held_out, seed)

    def __post_init__(self):
        if self.held_out and "held_out" in self.files:
            raise SourceError("held_out: give a fraction of 'train' or files of its own, not both")
        if not 0 <= self.held_out < 1:
            raise SourceError(f"held_out={self.held_out}: give a fraction from 0 to below 1")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits."""
        return (*self.files, "held_out") if self.held_out else tuple(self.files)

    def split_of(self, split: str, content: bytes) -> str:
        """Returns the split of a row with this content in a file of `split`."""
        if split != "train" or not self.held_out:
            return split
        return "held_out" if is_held_out(content, self.held_out, self.seed) else split


def kind_of_files(
    files: Iterable[DataFile], preprocess: Preprocess | None, reader: RowReader | None = None
) -> str:
    """Returns the name of the kind of the first example in these files.

    Raises:
      SourceError: no row is an example.
    """
    files, reader = list(files), reader or RowReader()
    first = EMPTY
    columns: list[str] = []
    for number, parse in _rows(files):
        try:
            row = parse()
            line = row if preprocess is None else preprocess(row)
            line = None if line is None else reader(line)[0]
        except Exception as error:  # Preparing reports errors of single rows.
            reason = str(error)
        else:
            if line is None:
                reason = "left out"
            elif kind := _kind(line):
                return kind
            else:
                columns = columns or list(row)
                reason = f"it has {', '.join(map(repr, row)) or 'nothing'}"[:200]
        if first == EMPTY:
            first = f" (row {number}: {reason})"
    query, positive = [*columns, "title", "body"][:2]
    raise SourceError(
        f"{', '.join(map(str, files))}: no row is an example{first}; understood are "
        f"{'; '.join(LAYOUTS)}; name other columns, for example with "
        f"--columns query={query},pos={positive}"
    )


def _rows(files: Iterable[DataFile]) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    for file in files:
        for block in file.read(MEGABYTE):
            for number, _, parse in block.rows():
                yield number, parse


def _kind(line: dict[str, Any]) -> str | None:
    """Returns the kind of a line, None if it is unknown or a query without passages."""
    return None if "query" in line and "pos" not in line else kind_of_line(line)
